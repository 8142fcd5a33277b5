"""Map-style data sets: objects with a length and [i], given or made by a function of a file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import SIZE, facts, noise, opened, pets
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder

from strata.stages.data.datasets import FromDataset
from strata.stages.data.images import survey
from strata.stages.data.opening import open_source
from strata.stages.errors import BrokenImage, DataError


class Pairs:
    """A data set that gives what a function makes of a number."""

    def __init__(self, make: Callable[[int], Any], count: int = 6) -> None:
        self.make, self.count, self.asked = make, count, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        self.asked.append(i)
        return self.make(i)


def pixels(i: int) -> np.ndarray:
    return noise(i, SIZE, SIZE, 3)


AS: dict[str, Callable[[int], Any]] = {
    "pair": lambda i: (pixels(i), i % 3),
    "image": lambda i: (Image.fromarray(pixels(i)), i % 3),
    "tensor": lambda i: (torch.from_numpy(pixels(i)).movedim(-1, 0), torch.tensor(i % 3)),
    "words": lambda i: (pixels(i), "abc"[i % 3]),
    "mapping": lambda i: {"img": pixels(i), "label": i % 3, "id": i},
    "one-hot": lambda i: [pixels(i), [i % 3 == k for k in range(3)]],
}


@pytest.mark.parametrize("kind", AS)
def test_samples_of_every_kind_are_the_same(kind: str) -> None:
    source = FromDataset(Pairs(AS[kind]), Pairs(AS[kind], 3))
    assert source.labels("train").tolist() == [0, 1, 2, 0, 1, 2]
    assert source.labels("test").dtype == np.int64
    assert source.classes == (("a", "b", "c") if kind == "words" else ("0", "1", "2"))
    for i in range(3):
        np.testing.assert_array_equal(np.asarray(source.image("test", i)), pixels(i))


def test_vectors_and_numbers_are_labels() -> None:
    source = FromDataset(Pairs(lambda i: (pixels(i), [i / 2, 1.0])))
    assert (source.splits, source.classes) == (("train",), ("0", "1"))
    np.testing.assert_array_equal(source.labels("train")[:, 0], np.arange(6, dtype=np.float32) / 2)
    assert FromDataset(Pairs(lambda i: (pixels(i), i / 4))).labels("train")[1] == np.float32(0.25)


def test_without_labels_there_is_one_class() -> None:
    for source in (FromDataset(Pairs(pixels)), FromDataset(TensorDataset(torch.zeros(4, 3, 8, 8)))):
        assert (source.classes, set(source.labels("train"))) == (("0",), {0})


def test_labels_are_taken_from_targets_where_samples_agree() -> None:
    class Known(Pairs):
        targets = [i % 3 for i in range(200)]  # noqa: RUF012 - as torchvision has it
        classes = ("x", "y", "z", "none of these")

    known = Known(AS["pair"], 200)
    source = FromDataset(known)
    assert len(known.asked) < 20
    assert source.labels("train").tolist() == Known.targets
    assert source.classes == Known.classes
    wrong = Known(lambda i: (pixels(i), 1 + i % 2), 200)
    assert FromDataset(wrong).labels("train").tolist() == [1 + i % 2 for i in range(200)]
    assert len(wrong.asked) >= 200


def test_torchvision_and_parts_of_it(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    parts = [ImageFolder(str(root / split)) for split in ("train", "test")]
    classes, _, labels, images, _ = facts(FromDataset(*parts))
    want = facts(opened(root))
    assert (classes, labels, images) == (want[0], want[2], want[3])
    part = FromDataset(Subset(parts[0], [1, 5]))
    assert (part.classes, part.labels("train").tolist()) == (("cat", "dog"), [0, 1])


def test_a_broken_sample_is_named_and_can_be_left_out() -> None:
    def give(i: int) -> tuple[Any, int]:
        return (pixels(i) if i != 2 else 1 // 0), i % 2

    source = FromDataset(Pairs(give), Pairs(AS["pair"], 3))
    with pytest.raises(DataError, match=r"1 broken image of 9, .*train/2 \(.*ZeroDivisionError"):
        survey(source, skip_broken=False)
    assert survey(source, skip_broken=True).kept["train"].tolist() == [0, 1, 3, 4, 5]


def test_a_label_that_changes_is_broken() -> None:
    labels = list(range(6))
    source = FromDataset(Pairs(lambda i: (pixels(i), labels[i])))
    labels[4] = 0
    with pytest.raises(BrokenImage, match="its label is 0 now, and was 4"):
        source.image("train", 4)


def test_samples_drawn_at_random_are_refused() -> None:
    draws = torch.Generator().manual_seed(0)
    drawn = Pairs(lambda i: (torch.rand(3, 8, 8, generator=draws), 0))
    with pytest.raises(DataError, match=r"another sample 0 at each reading: leave what is drawn"):
        FromDataset(drawn)


def test_the_signature_follows_labels_and_samples() -> None:
    found = {
        FromDataset(Pairs(make, count)).signature()
        for make, count in (
            (AS["pair"], 6),
            (AS["pair"], 5),
            (lambda i: (pixels(i + 1), i % 3), 6),
            (lambda i: (pixels(i), i % 2), 6),
        )
    }
    assert len(found) == 4
    assert FromDataset(Pairs(AS["pair"])).signature() in found


def test_one_thread_at_a_time_asks() -> None:
    inside, most = [0], [0]
    wait = threading.Event()

    def give(i: int) -> tuple[np.ndarray, int]:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        wait.wait(0.002)
        inside[0] -= 1
        return pixels(i), 0

    source = FromDataset(Pairs(give))
    threads = [threading.Thread(target=source.image, args=("train", i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((x for x in "ab"), "the data set is a generator, must be a map-style data set: len(d)"),
        (3, "the data set is a int, must be"),
        (Pairs(lambda i: (pixels(i), object())), "must be numbers or words"),
    ],
)
def test_what_is_no_data_set(given: Any, told: str) -> None:
    with pytest.raises(DataError) as refused:
        FromDataset(given)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda i: (pixels(i), 0, i), "it has 3 parts, must be (x, y)"),
        (lambda i: {"label": 1}, "it is a mapping of label, without an image"),
        (lambda i: ("photo.jpg", 1), "it is a str, must be an image, an array or a tensor"),
    ],
)
def test_what_is_no_sample(make: Callable[[int], Any], told: str) -> None:
    with pytest.raises(BrokenImage) as refused:
        FromDataset(Pairs(make)).image("train", 1)
    assert told in str(refused.value)


# ---- python:FILE.py:FUNCTION ---------------------------------------------------------------------

CODE = """
from pathlib import Path
import torch
from beside import pixels

class Mine(torch.utils.data.Dataset):
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, i): return pixels(i), i % 2

def one(): return Mine(6)
def two(): return Mine(6), Mine(4)
def named(): return {"train": Mine(6), "validation": Mine(4)}
def three(): return Mine(6), Mine(4), Mine(2)
def drawn(): return torch.utils.data.random_split(Mine(10), [6, 4])
def fails(): return open("nowhere.txt")
def ends(): raise SystemExit(3)
def bad():
    found = Mine(6)
    Mine.__getitem__ = lambda self, i: {}["key"]
    return found
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "beside.py").write_text(
        "import numpy as np\ndef pixels(i): return np.full((8, 8, 3), i, np.uint8)\n"
    )
    return tmp_path / "mine.py"


@pytest.mark.parametrize(("function", "test"), [("two", 4), ("named", 4), ("drawn", 4)])
def test_a_function_gives_data_sets(file: Path, function: str, test: int) -> None:
    spec, before = f"python:{file}:{function}", torch.random.get_rng_state()
    with open_source(spec, root=file) as source, open_source(spec, root=file) as again:
        assert (source.count("train"), source.count("test")) == (6, test)
        assert survey(source, skip_broken=False).digest == survey(again, skip_broken=False).digest
        assert source.signature() == again.signature()
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_signature_follows_the_code(file: Path) -> None:
    with open_source(f"python:{file}:two", root=file) as source:
        before = source.signature()
    file.write_text(CODE + "\n# another\n")
    with open_source(f"python:{file}:two", root=file) as source:
        assert source.signature() != before


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("mine.py:one", "python:mine.py:one has no test split. Pass --split 0.2"),
        ("mine.py:three", "python:mine.py:three gives 3 things, must be one or two data sets"),
        ("mine.py:nix", "mine.py has no function nix: give python:FILE.py:FUNCTION"),
        ("nix.py:one", "nix.py cannot be read"),
        ("mine.py:fails", "python:mine.py:fails: mine.py, line 16, FileNotFoundError"),
        ("mine.py:ends", "python:mine.py:ends: mine.py, line 17, SystemExit: 3"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_line(file: Path, place: str, told: str) -> None:
    with pytest.raises(DataError) as refused:
        open_source(f"python:{file.parent / place}", root=file)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_error_in_a_sample_has_its_line(file: Path) -> None:
    file.write_text(CODE.replace("def one(): return Mine(6)", "def one(): return bad(), bad()"))
    with (
        open_source(f"python:{file}:one", root=file) as source,
        pytest.raises(DataError, match=r"12 broken .*train/0 \(mine\.py, line 20, KeyError: 'key'"),
    ):
        survey(source, skip_broken=False)
