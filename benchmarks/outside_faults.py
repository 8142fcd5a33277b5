"""Faults of the outside: of files and folders, of disks, of streams, of limits and of names."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
from strata.store.files.publish import sealed, unseal


def nothing(*_: object) -> None:
    """No fault."""


@dataclass(frozen=True)
class Fault:
    """One way in which the outside is broken."""

    kind: str
    what: str
    """What is broken: a pattern of paths, a stream, an option."""
    break_files: Callable[[Path], object] = nothing
    break_process: Callable[[], object] = nothing
    option: tuple[str, str] | None = None
    """An option of a command, and the value that it gets instead."""
    spoils: tuple[str, ...] = ()
    """How the paths begin of what is broken, and so may be made again or be gone."""
    not_for: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.what}: {self.kind}"

    def words(self, words: Sequence[str]) -> list[str]:
        """A command's arguments, with the option changed."""
        if self.option is None:
            return list(words)
        place, value = self.option
        if place.startswith("--"):
            pairs = zip(("", *words), words, strict=False)
            return [value if before == place else word for before, word in pairs]
        return [value if word == place else word for word in words]

    def meets(self, command: str, words: Sequence[str]) -> bool:
        return command not in self.not_for and (self.option is None or self.option[0] in words)


# ---- files and folders --------------------------------------------------------------------------


def removed(path: Path) -> None:
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)


def written(path: Path, data: bytes) -> None:
    removed(path)
    path.write_bytes(data)


def cut(path: Path) -> None:
    written(path, path.read_bytes()[: path.stat().st_size // 2])


def no_text(path: Path) -> None:
    written(path, "naïve ✓".encode("utf-16"))


def folder(path: Path) -> None:
    removed(path)
    path.mkdir()
    (path / "inside").write_bytes(b"")


def emptied(path: Path) -> None:
    removed(path)
    path.mkdir()


def dangling(path: Path) -> None:
    removed(path)
    path.symlink_to(path.with_name("nowhere") / "at all")


def looped(path: Path) -> None:
    removed(path)
    path.symlink_to(path.name)


def of_body(body: Callable[[Any], Any], path: Path) -> None:
    """A sealed record, sound by its hash, that says something else."""
    written(path, sealed(body(unseal(path))))


def renamed(body: Any) -> Any:
    """The fields of another version."""
    return {f"{key}_2": value for key, value in body.items()}


def of_text(path: Path) -> None:
    """Values of other types."""

    def other(value: Any) -> Any:
        match value:
            case dict():
                return {key: other(one) for key, one in value.items()}
            case list():
                return {}
            case str():
                return [value]
        return str(value)

    written(path, sealed(other(unseal(path))))


FILE: dict[str, Callable[[Path], None]] = {
    "missing": removed,
    "empty": lambda path: written(path, b""),
    "cut short": cut,
    "no text": no_text,
    "a folder": folder,
    "a dangling link": dangling,
    "a link to itself": looped,
}
RECORD = FILE | {
    "another version": partial(of_body, renamed),
    "of another shape": partial(of_body, lambda body: [1]),
    "of no fields": partial(of_body, lambda body: {}),
    "other types": of_text,
    "no JSON": lambda path: written(path, b'{"body": 1, '),
}
FOLDER: dict[str, Callable[[Path], None]] = {
    "missing": removed,
    "an empty folder": emptied,
    "a file": lambda path: written(path, b"x"),
    "a dangling link": dangling,
    "a link to itself": looped,
}
EXTRA: dict[str, Callable[[Path], None]] = {
    "a file too many": lambda path: nothing((path / ".DS_Store").write_bytes(b"\0")),
    "a folder too many": lambda path: (path / "@eaDir" / "inside").mkdir(parents=True),
    "a dangling link too many": lambda path: (path / "lost").symlink_to("nowhere"),
    "a name that is no text": lambda path: Path(os.fsdecode(bytes(path) + b"/\xff")).mkdir(),
}
TARGETS: tuple[tuple[str, dict[str, Callable[[Path], None]]], ...] = (
    *((f"runs/{run}/{name}", RECORD) for run in "ab" for name in ("run.json", "data.json")),
    *((f"runs/{run}/evaluation.json", RECORD) for run in "ab"),
    *((f"runs/{run}/layer_1/layer.json", RECORD) for run in "ab"),
    *((f"runs/{run}/probe_1/linear/result.json", RECORD) for run in "ab"),
    *((f"runs/{run}/baseline/plain/result.json", RECORD) for run in "ab"),
    ("runs/a/sweep_final/*/result.json", RECORD),
    ("runs/a/layer_1/features.json", RECORD),
    *((f"runs/{run}/recipe.toml", FILE) for run in "ab"),
    *((f"runs/a/layer_1/{name}", FILE) for name in ("weights.safetensors", "epochs.jsonl")),
    ("runs/a/layer_2/test_logits.npy", FILE),
    ("runs/a/baseline/plain/weights.safetensors", FILE),
    ("runs/a/report.json", FILE),
    ("runs/a/LOCK", FILE),
    *((f"runs/{name}", FOLDER | EXTRA) for name in ("a", "b", "a/layer_1", "a/probe_1")),
    *((f"runs/a/{name}", FOLDER | EXTRA) for name in ("baseline", "sweep_final")),
    ("runs", EXTRA),
    ("store", FOLDER | EXTRA),
    ("store/x_1-*", FOLDER | EXTRA),
    ("store/x_1-*/test", FOLDER | EXTRA),
    ("store/x_2-*/train.plain", FOLDER),
    ("store/x_0-*/train/COMMIT.json", RECORD),
    ("store/x_1-*/test/COMMIT.json", RECORD),
    ("store/x_1-*/intent.json", RECORD),
    ("store/x_1-*/test/zarr.json", FILE),
    ("store/x_1-*/test/x", FOLDER),
    ("store/x_1-*/test/x/zarr.json", FILE),
    ("store/x_1-*/test/label/c.0", FILE),
    ("store/x_1-*/test/x/c.0.0.0.0", FILE),
    ("store/x_1-*/test/receipts", FOLDER),
    ("store/x_1-*/test/receipts/000000.json", RECORD),
    ("store/runs", FOLDER | EXTRA),
    ("store/runs/*.json", RECORD),
    ("store/locks", FOLDER),
    ("tiny.toml", FILE),
    ("images.npz", FILE),
)


def one(pattern: str, place: Path) -> Path:
    """The first path of a pattern that is of ``runs/a``: names of levels come by chance."""
    return sorted(place.glob(pattern))[0]


def _of_files() -> Iterator[Fault]:
    for pattern, kinds in TARGETS:
        # A run that is gone uses nothing, and what made a level is not needed by one that is gone.
        gone = ("gc --delete",) if pattern.startswith(("runs", "store/runs")) else ()
        for kind, spoil in kinds.items():

            def break_files(place: Path, pattern: str = pattern, spoil: Any = spoil) -> None:
                spoil(one(pattern, place))

            extra = kind in EXTRA
            spoils = () if extra else (pattern.partition("*")[0],)
            yield Fault(kind, pattern, break_files, spoils=spoils, not_for=() if extra else gone)


# ---- disks that refuse --------------------------------------------------------------------------

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")
LOOKS = ("os.listdir", "os.scandir")


def refusing(number: int, part: str, writes: bool = False) -> Callable[[], None]:
    """Let every call fail that names a path with ``part`` in it; ``writes``: that changes it."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if writes and not (isinstance(flags, int) and flags & WRITES):
                return
        elif event in CHANGES or (event in LOOKS and not writes):
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike):
            text = str(Path(os.fsdecode(path)).absolute())
            if part in f"{text}/":
                raise OSError(number, os.strerror(number), os.fsdecode(path))

    return lambda: sys.addaudithook(hook)


REFUSED = (
    "/place/runs/a/",
    "/place/runs/b/",
    "/place/store/",
    "/COMMIT.json/",
    "/layer.json/",
    "/recipe.toml/",
    "/weights.safetensors/",
    "/c.0.0.0.0/",
    "/tiny.toml/",
    "/images.npz/",
    "/place/store/runs/",
    "/result.json/",
    "/LOCK/",
)


def _of_disks() -> Iterator[Fault]:
    for part in REFUSED:
        for kind, number in (("failing", errno.EIO), ("unreadable", errno.EACCES)):
            yield Fault(kind, part, break_process=refusing(number, part))
    for part in ("/place/runs/a/", "/place/store/", "/place/"):
        for kind, number in (
            ("full", errno.ENOSPC),
            ("read-only", errno.EROFS),
            ("over quota", errno.EDQUOT),
        ):
            yield Fault(kind, part, break_process=refusing(number, part, writes=True))
    for count in (0, 3, 8, 20):
        limit = partial(_limit_files, count)
        yield Fault("out of descriptors", f"{count} files", break_process=limit)
    for nbytes in (0, 1000, 20_000):
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (nbytes, nbytes))
        yield Fault("too large a file", f"{nbytes} bytes", break_process=limit)


def _limit_files(more: int) -> None:
    held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + more, held + more))


# ---- streams ------------------------------------------------------------------------------------


def closed(number: int) -> None:
    os.close(number)
    name = ("stdin", "stdout", "stderr")[number]
    setattr(sys, name, None)
    setattr(sys, f"__{name}__", None)


def full(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def broken(number: int) -> None:
    ours, theirs = os.pipe()
    os.dup2(theirs, number)
    os.close(ours)
    os.close(theirs)


def in_words(encoding: str, number: int) -> None:
    stream = os.fdopen(number, "w", closefd=False, encoding=encoding)
    name = ("stdin", "stdout", "stderr")[number]
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _of_streams() -> Iterator[Fault]:
    for number, name in ((1, "stdout"), (2, "stderr")):
        ways = {"closed": closed, "full": full, "broken pipe": broken}
        ways |= {f"in {code}": partial(in_words, code) for code in ("ascii", "latin-1", "cp1252")}
        for kind, way in ways.items():
            yield Fault(kind, name, break_process=partial(way, number))


# ---- names --------------------------------------------------------------------------------------


def _of_names() -> Iterator[Fault]:
    names = {
        "too long": "x" * 300,
        "too deep": "/".join("x" * 200 for _ in range(40)),
        "in a file": "images.npz/x",
        "~nobody": "~nobody-of-that-name/x",
        "no text": os.fsdecode(b"caf\xe9"),
        "with markup": "[/x] :x: [b]",
        "/dev/null": "/dev/null",
        "a level": "store/x_1",
        "a run": "runs/b",
        "the store": "store",
        "/proc": "/proc/x",
    }
    for option in ("--run", "--store", "--to", "tiny.toml"):
        for kind, value in names.items():
            yield Fault(kind, option, option=(option, value))
    sources = {
        "a null byte": "npz:a\\u0000b",
        "~nobody": "npz:~nobody-of-that-name/x",
        "too long": f"npz:{'x' * 300}",
        "a folder": "npz:.",
        "no folder": "imagefolder:images.npz",
        "through a file": "imagefolder:images.npz/x",
        "of a pipe": "npz:/dev/null",
    }
    for kind, value in sources.items():

        def break_files(place: Path, value: str = value) -> None:
            for path in (place / "tiny.toml",):
                path.write_text(path.read_text().replace("npz:images.npz", value))

        yield Fault(kind, "data.source", break_files)


FAULTS = (*_of_files(), *_of_disks(), *_of_streams(), *_of_names())
