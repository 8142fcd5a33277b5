"""Class folders under train/ and test/, in a directory or in a tar, as a source."""

from __future__ import annotations

import io
import lzma
import os
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, Self, cast

import numpy as np
from PIL import Image

from strata.stages.data.sources import SPLITS, Source, short_reason, stamp
from strata.stages.errors import DataError

_SUFFIXES = frozenset(("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"))
_TEST = ("test", "val")


class ImageFolder(Source):
    """A tree of images as a source: classes and files each in sorted order.

    Files and folders go by their slashed path from the folder that holds train/. Only files with
    the suffix of an image format count, and none whose name starts with a dot. Raises DataError
    when there is no train/ or no test/ (or val/), a class of train has no images, or test has
    another class.
    """

    def __init__(self, title: str, folders: Collection[str], files: Collection[str]) -> None:
        tops = {"train": "train", "test": _test_folder(title, folders, files)}
        found = {split: _members(files, tops[split]) for split in SPLITS}
        parts = [folder.split("/") for folder in folders]
        classes = sorted(part[1] for part in parts if part[0] == "train" and len(part) == 2)
        _check_classes(title, classes, *({kind for kind, _ in found[split]} for split in SPLITS))
        number = {name: label for label, name in enumerate(classes)}
        labels = {split: np.array([number[kind] for kind, _ in found[split]]) for split in SPLITS}
        super().__init__(title, labels, classes)
        self._names = {split: [name for _, name in found[split]] for split in SPLITS}

    def name(self, split: str, i: int) -> str:
        return self._names[split][i]

    @abstractmethod
    def _read(self, file: str) -> bytes:
        """The bytes of one file. Raises OSError."""

    def _open(self, split: str, i: int) -> tuple[bytes, Image.Image]:
        if not (data := self._read(self._names[split][i])):
            raise ValueError("the file is empty")
        return data, Image.open(io.BytesIO(data))


def open_imagefolder(path: Path) -> ImageFolder:
    """The class folders of a directory or tar (plain or compressed); see ImageFolder."""
    if path.is_dir():
        return _Directory(path)
    if path.is_file():
        return _Archive(path)
    raise DataError(f"there is no directory or tar {path}")


def _test_folder(title: str, folders: Collection[str], files: Collection[str]) -> str:
    if "train" not in folders:
        raise DataError(f"{title} has no folder train/")
    there = [folder for folder in _TEST if folder in folders]
    if not there:
        raise DataError(f"{title} has no folder test/ or val/")
    # ImageNet has both, and what lies in test/ has no classes.
    return next((folder for folder in there if _members(files, folder)), there[0])


def _members(files: Collection[str], top: str) -> list[tuple[str, str]]:
    """(class, path) of every image below a class folder, sorted; folders below count too."""
    split = ((file.split("/"), file) for file in files)
    return sorted((part[1], file) for part, file in split if part[0] == top and len(part) > 2)


def _check_classes(title: str, classes: list[str], train: set[str], test: set[str]) -> None:
    """Raise DataError unless every class has images in train, and test has some and no others."""
    if not classes:
        raise DataError(f"train/ in {title} is empty: it must hold one folder per class")
    if bare := [kind for kind in classes if kind not in train]:
        raise DataError(f"class {bare[0]} has no images under train/ in {title}")
    if not test:
        raise DataError(
            f"the test split of {title} has no images: they belong into a folder for each class, "
            f"such as {classes[0]}/"
        )
    if extra := sorted(test - train):
        raise DataError(f"class {extra[0]} is only in the test split of {title}, not in train/")


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _wanted(path: str) -> bool:
    """Whether a slashed path is one of an image and nothing along it is hidden."""
    return not _hidden(path) and path.rpartition(".")[2].lower() in _SUFFIXES


def _unreadable(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


class _Directory(ImageFolder):
    """Class folders on disk; symbolic links are followed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: list[str] = []
        folders: list[str] = []
        for top in (root / top for top in ("train", *_TEST) if (root / top).is_dir()):
            for place, _, files in os.walk(top, onerror=_unreadable, followlinks=True):
                folder = Path(place).relative_to(root).as_posix()
                if not _hidden(folder):
                    folders.append(folder)
                    self._files += filter(_wanted, (f"{folder}/{file}" for file in files))
        super().__init__(str(root), folders, self._files)

    def _read(self, file: str) -> bytes:
        return (self._root / file).read_bytes()

    def signature(self) -> str:
        root = self._root.resolve()
        return stamp(("directory",), (root / file for file in sorted(self._files)))


class _Archive(ImageFolder):
    """A tar, read at random by offset.

    A plain one is read in place. A compressed one cannot be, so its images, still encoded, are
    copied once into an anonymous temporary file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data: IO[bytes] | None = None
        try:
            self._places, folders = self._indexed()
            super().__init__(str(path), folders, self._places)
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            self.close()
            raise DataError(f"{path} cannot be read as a tar: {short_reason(error)}") from error
        except BaseException:
            self.close()
            raise

    def _indexed(self) -> tuple[dict[str, tuple[int, int]], set[str]]:
        """See :func:`_index`. Opens the file that is read from then on."""
        try:
            with tarfile.open(self._path, "r:", tarinfo=_Header) as tar:
                self._data = self._path.open("rb")
                return _index(tar, None)
        except tarfile.ReadError:
            if self._data is not None:  # a plain tar after all, but damaged
                raise
        self._data = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        with tarfile.open(self._path, "r|*", tarinfo=_Header) as tar:
            found = _index(tar, self._data)
        self._data.flush()  # pread goes past Python's buffer
        return found

    def _read(self, file: str) -> bytes:
        assert self._data is not None
        start, size = self._places[file]
        return os.pread(self._data.fileno(), size, start)

    def signature(self) -> str:
        return stamp(("archive",), [self._path.resolve()])

    def close(self) -> None:
        if self._data is not None:
            self._data.close()


class _Header(tarfile.TarInfo):
    """A tar's header, refused when damaged: tarfile would take it for the tar's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # a block of zeros, the end
            reason = f"{error}, or cut short" if buf else "it is cut short"
            raise tarfile.ReadError(reason) from error


def _index(
    tar: tarfile.TarFile, spool: IO[bytes] | None
) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Where a tar's images lie, (offset, size) by path, and its folders, also implied ones.

    Paths are without the one folder, other than train/, in which everything lies. Images lie in
    `spool`, to which they are copied, or, without, in the tar. Raises DataError for a stray link.
    """
    places: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    folders: set[str] = set()
    while (member := tar.next()) is not None:
        # What tarfile remembers of each member would grow past the index itself.
        cast(Any, tar).members.clear()
        name = posixpath.normpath(member.name).lstrip("/")
        if member.isdir():
            folders.add(name)
        elif not _wanted(name):
            continue
        elif member.islnk():
            links[name] = posixpath.normpath(member.linkname).lstrip("/")
        elif member.issym():
            beside = posixpath.join(posixpath.dirname(name), member.linkname)
            links[name] = posixpath.normpath(beside)
        elif member.issparse():
            raise DataError(f"{tar.name} holds {name} as a sparse file: pack it without --sparse")
        elif member.isreg() and spool is None:
            places[name] = (member.offset_data, member.size)
        elif member.isreg() and (source := tar.extractfile(member)) and spool is not None:
            places[name] = (spool.tell(), member.size)
            shutil.copyfileobj(source, spool)
    for name, target in links.items():
        if target not in places:
            raise DataError(f"{name} is a link to {target}, which is no image of the archive")
        places[name] = places[target]
    folders.discard(".")
    for name in places:
        folder = posixpath.dirname(name)
        while folder and folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    tops = {folder.split("/")[0] for folder in folders if not _hidden(folder)}
    skip = len(tops.pop()) + 1 if len(tops) == 1 and "train" not in tops else 0
    inside = {folder[skip:] for folder in folders}
    return (
        {name[skip:]: place for name, place in places.items()},
        {folder for folder in inside if not _hidden(folder)},
    )
