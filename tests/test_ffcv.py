"""The optional ffcv, as installed here, writes and reads a .beton without changing a pixel."""

import os
import signal
import sys
from importlib.util import find_spec
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

import pytest

NOT_IMPORTABLE = 77
SECONDS = 240

# In a process of its own: when one of ffcv's workers fails, the others wait for ever.
ROUND_TRIP = f"""
import sys
try:
    from ffcv import DatasetWriter, Loader
except (ImportError, OSError) as error:
    print(f"{{type(error).__name__}}: {{error}}", file=sys.stderr)
    sys.exit({NOT_IMPORTABLE})
from ffcv.fields import IntField, NDArrayField, RGBImageField
from ffcv.fields.decoders import IntDecoder, NDArrayDecoder, SimpleRGBImageDecoder
from ffcv.loader import OrderOption
import numpy as np
from sklearn.datasets import load_digits

N, BATCH = 192, 64
digits = load_digits()
grey = (digits.images[:N] * 15).astype(np.uint8)
images = np.repeat(grey[..., None], 3, axis=3)
images[..., 1] //= 2
labels = digits.target[:N]


class Digits:
    def __len__(self):
        return N

    def __getitem__(self, i):
        return images[i], grey[i], int(labels[i])


fields = {{
    "image": RGBImageField(write_mode="raw"),
    "array": NDArrayField(np.dtype("uint8"), grey.shape[1:]),
    "label": IntField(),
}}
DatasetWriter(sys.argv[1], fields, num_workers=1).from_indexed_dataset(Digits())
pipelines = {{
    "image": [SimpleRGBImageDecoder()],
    "array": [NDArrayDecoder()],
    "label": [IntDecoder()],
}}
loader = Loader(sys.argv[1], batch_size=BATCH, num_workers=1, os_cache=True, seed=0,
                order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines)
rows = 0
for image, array, label in loader:
    here = slice(rows, rows + len(label))
    np.testing.assert_array_equal(np.asarray(image), images[here])
    np.testing.assert_array_equal(np.asarray(array), grey[here])
    np.testing.assert_array_equal(np.asarray(label).ravel(), labels[here])
    rows += len(label)
assert rows == N, rows
"""


@pytest.mark.ffcv
@pytest.mark.skipif(find_spec("ffcv") is None, reason="ffcv is not installed (make ffcv)")
def test_a_beton_gives_back_every_pixel_and_label(tmp_path):
    script = tmp_path / "round_trip.py"
    script.write_text(ROUND_TRIP)
    beton = tmp_path / "digits.beton"
    code, errors = run_in_its_own_group([sys.executable, str(script), str(beton)])
    if code == NOT_IMPORTABLE:
        pytest.skip(f"ffcv is installed but does not import: {errors.strip().splitlines()[-1]}")
    assert code == 0, errors


def run_in_its_own_group(command: list[str]) -> tuple[int, str]:
    """Run, and on a timeout end the workers too."""
    with Popen(command, stdout=DEVNULL, stderr=PIPE, text=True, start_new_session=True) as run:
        try:
            _, errors = run.communicate(timeout=SECONDS)
        except TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            pytest.fail(f"ffcv was still not done after {SECONDS} s")
    return run.returncode, errors
