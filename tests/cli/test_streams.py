"""Streams that are closed, full, broken or not of UTF-8 cost no work, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment, recipe
from root import CLI, PYTHONPATH
from runs import inside

SPEAK = "from strata.pipeline import streams; streams.install(); import os, sys; "


def shell(cwd: Path, line: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A line for bash, in which $S is the command and $PY its Python."""
    names = {"PY": sys.executable, "S": f"{sys.executable} {CLI}", "PYTHONPATH": PYTHONPATH}
    env = {**environment(), **names, **more}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=env, capture_output=True, timeout=120)


# ---- the streams alone --------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_nobody_else_s_file(tmp_path: Path, which: str) -> None:
    """What a library prints to descriptor 1 or 2 would go into the first file that is opened."""
    code = SPEAK + (
        "file = open('weights', 'wb'); assert file.fileno() > 2; "
        "[os.write(n, b'printed') for n in (1, 2)]; print('said'); print('told', file=sys.stderr); "
        "assert sys.stdin.read() == ''; assert streams.lost() is None; file.write(b'1')"
    )
    said = shell(tmp_path, f'"$PY" -c "$CODE" < /dev/null {which}', CODE=code)
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "weights").read_bytes() == b"1"


def test_children_have_the_streams_too(tmp_path: Path) -> None:
    code = SPEAK + "import subprocess; sys.exit(subprocess.call(['sh', '-c', 'echo said']))"
    assert shell(tmp_path, '"$PY" -c "$CODE" >&-', CODE=code).returncode == 0


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("> /dev/full", "No space left on device"),
        ("| true", "None"),
        ("| cat", "None"),
    ],
)
def test_lost_is_what_nobody_can_read(tmp_path: Path, line: str, why: str) -> None:
    code = SPEAK + "print('x' * 200_000); why = streams.lost(); print(why, file=sys.stderr)"
    said = shell(tmp_path, f'set -o pipefail; sleep 0.1; "$PY" -c "$CODE" {line}', CODE=code)
    assert (said.returncode, said.stderr.decode()) == (0, f"{why}\n")


def test_a_pipe_that_does_not_wait_gets_every_byte(tmp_path: Path) -> None:
    code = "os.set_blocking(1, False); print('x' * 1_000_000); streams.lost()"
    said = shell(tmp_path, '"$PY" -c "$CODE" | (sleep 0.3; wc -c)', CODE=SPEAK + code)
    assert said.stdout.strip() == b"1000001", said.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_does_not_have_is_written_as_a_number(
    tmp_path: Path, encoding: str
) -> None:
    code = SPEAK + r"print('\u2026 M\u0303 caf\udce9')"
    said = shell(tmp_path, '"$PY" -c "$CODE"', CODE=code, PYTHONIOENCODING=encoding)
    assert said.returncode == 0, said.stderr
    seen = said.stdout.decode(encoding).strip()
    assert seen == ("… M\u0303 caf\\udce9" if encoding == "utf-8" else r"\u2026 M\u0303 caf\udce9")


# ---- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of one layer."""
    cwd = tmp_path_factory.mktemp("streams")
    recipe(cwd, network__layers=1, network__downsample=[], schedule__epochs=1)
    assert inside(cwd, "run", "tiny.toml", "--json").rc == 0
    return cwd


def test_an_answer_on_a_full_disk_is_told_and_work_is_not_failed(place: Path) -> None:
    said = shell(place, "$S status tiny.toml > /dev/full")
    text = "Warning: the answer on stdout is lost: no space left on device\n"
    assert (said.returncode, said.stderr.decode()) == (0, text)


def test_all_work_is_done_where_nobody_hears(tmp_path: Path, place: Path) -> None:
    recipe(tmp_path, network__layers=1, network__downsample=[], schedule__epochs=1)
    said = shell(tmp_path, "$S run tiny.toml --device cpu > /dev/full 2>&-")
    assert said.returncode == 0
    weights = "runs/tiny/0/layer_1/weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (place / weights).read_bytes()
    assert (tmp_path / "runs/tiny/0/report.html").exists()


@pytest.mark.parametrize("line", ["$S status tiny.toml | true", "$S plan tiny.toml >&-"])
def test_a_reader_that_goes_is_no_error(place: Path, line: str) -> None:
    said = shell(place, f"set -o pipefail; {line}")
    assert (said.returncode, said.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", ["recipes", "plan tiny.toml", "sweep --help", "status --json"])
def test_streams_of_other_encodings_hear_everything(place: Path, encoding: str, words: str) -> None:
    said = shell(place, f"$S {words}", PYTHONIOENCODING=encoding)
    assert (said.returncode, said.stderr) == (0, b"")
    if "--help" not in words or encoding != "ascii":  # which click takes for a mistake
        assert said.stdout.decode(encoding)


def test_an_error_of_another_encoding_is_still_one_line(place: Path) -> None:
    said = shell(place, "$S plan gone…x.toml; echo $?", PYTHONIOENCODING="ascii")
    assert said.stdout == b"3\n"
    assert os.fsdecode(said.stderr).count("\n") == 1
