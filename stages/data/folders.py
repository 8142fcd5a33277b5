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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, Self, cast

import numpy as np
from PIL import Image

from strata.stages.data.sources import SPLITS, Listed, decoded, one_line, stamp
from strata.stages.errors import BrokenImage, DataError

_SUFFIXES = frozenset(("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"))
_TEST = ("test", "val")


class _Tree(Protocol):
    """Files by their slashed path from the folder that holds train/, and the folders there are."""

    @property
    def files(self) -> Iterable[str]: ...
    @property
    def folders(self) -> Iterable[str]: ...
    def read(self, file: str) -> bytes: ...
    def signature(self) -> str: ...
    def close(self) -> None: ...


class ImageFolder(Listed):
    """A tree of images as a source: classes and files each in sorted order.

    Only files with the suffix of an image format count, and none whose name starts with a dot.
    Takes the tree over: closes it with itself, also when refusing it. Raises DataError when there
    is no train/ or no test/ (or val/), a class of train has no images, or test has another class.
    """

    def __init__(self, title: str, tree: _Tree) -> None:
        try:
            chosen = {"train": "train", "test": _test_folder(title, tree)}
            classes = _classes(title, tree)
            found = {split: _members(tree, folder) for split, folder in chosen.items()}
            _check_classes(title, classes, found)
            number = {name: label for label, name in enumerate(classes)}
            labels = {
                split: np.array([number[kind] for kind, _ in found[split]], np.int64)
                for split in SPLITS
            }
            super().__init__(title, classes, labels)
        except BaseException:
            tree.close()
            raise
        self._names = {split: [name for _, name in found[split]] for split in SPLITS}
        self._tree = tree

    def name(self, split: str, i: int) -> str:
        return self._names[split][i]

    def content(self, split: str, i: int) -> bytes:
        name = self._names[split][i]
        try:
            return self._tree.read(name)
        except OSError as error:
            raise BrokenImage(name, error.strerror or one_line(error)) from error

    def image(self, split: str, i: int) -> Image.Image:
        data = self.content(split, i)
        if not data:
            raise BrokenImage(self.name(split, i), "the file is empty")
        return decoded(self.name(split, i), lambda: Image.open(io.BytesIO(data)))

    def signature(self) -> str:
        return self._tree.signature()

    def close(self) -> None:
        self._tree.close()


def open_imagefolder(path: Path) -> ImageFolder:
    """The class folders of a directory or tar (plain or compressed); see ImageFolder."""
    if path.is_dir():
        return ImageFolder(str(path), _Directory(path))
    if path.is_file():
        return ImageFolder(str(path), _Archive(path))
    raise DataError(f"there is no directory or tar {path}")


def _test_folder(title: str, tree: _Tree) -> str:
    folders = set(tree.folders)
    if "train" not in folders:
        raise DataError(f"{title} has no folder train/")
    there = [folder for folder in _TEST if folder in folders]
    if not there:
        raise DataError(f"{title} has no folder test/ or val/")
    # ImageNet has both, and what lies in test/ has no classes.
    return next((folder for folder in there if _members(tree, folder)), there[0])


def _classes(title: str, tree: _Tree) -> list[str]:
    parts = (folder.split("/") for folder in tree.folders)
    classes = sorted(part[1] for part in parts if part[0] == "train" and len(part) == 2)
    if not classes:
        raise DataError(f"train/ in {title} is empty: it must hold one folder per class")
    return classes


def _members(tree: _Tree, folder: str) -> list[tuple[str, str]]:
    """(class, path) of every image below a class folder, sorted; folders below count too."""
    split = ((file.split("/"), file) for file in tree.files)
    return sorted((part[1], file) for part, file in split if part[0] == folder and len(part) > 2)


def _check_classes(
    title: str, classes: Sequence[str], found: dict[str, list[tuple[str, str]]]
) -> None:
    full = {kind for kind, _ in found["train"]}
    if bare := [kind for kind in classes if kind not in full]:
        raise DataError(f"class {bare[0]} has no images under train/ in {title}")
    if not found["test"]:
        raise DataError(
            f"the test split of {title} has no images: they belong into a folder for each class, "
            f"such as {classes[0]}/"
        )
    if extra := sorted({kind for kind, _ in found["test"]} - full):
        raise DataError(f"class {extra[0]} is only in the test split of {title}, not in train/")


def _wanted(path: str) -> bool:
    """Whether a slashed path is one of an image and nothing along it is hidden."""
    return not _hidden(path) and path.rpartition(".")[2].lower() in _SUFFIXES


def _hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _unreadable(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


class _Directory:
    """A tree on disk; symbolic links are followed."""

    def __init__(self, root: Path) -> None:
        self.folders: list[str] = []
        self.files: list[str] = []
        self._root = root
        for top in ("train", *_TEST):
            if (root / top).is_dir():
                self._walk(top)

    def _walk(self, top: str) -> None:
        for place, _, files in os.walk(self._root / top, onerror=_unreadable, followlinks=True):
            folder = Path(place).relative_to(self._root).as_posix()
            if not _hidden(folder):
                self.folders.append(folder)
                self.files += filter(_wanted, (f"{folder}/{file}" for file in files))

    def read(self, file: str) -> bytes:
        return (self._root / file).read_bytes()

    def signature(self) -> str:
        root = self._root.resolve()
        return stamp(("directory",), (root / file for file in sorted(self.files)))

    def close(self) -> None:
        """Nothing is held open."""


class _Archive:
    """A tar, read at random by offset.

    A plain one is read in place. A compressed one cannot be, so its images, still encoded, are
    copied once into an anonymous temporary file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data: IO[bytes] | None = None
        try:
            index = self._open()
            self._places = index.files()
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            self.close()
            raise DataError(f"{path} cannot be read as a tar: {one_line(error)}") from error
        except BaseException:
            self.close()
            raise
        self.files = self._places.keys()
        self.folders = index.folders()

    def _open(self) -> _Index:
        try:
            with tarfile.open(self._path, "r:", tarinfo=_Header) as tar:
                self._data = self._path.open("rb")
                return _Index(tar, None)
        except tarfile.ReadError:
            if self._data is not None:  # a plain tar after all, but damaged
                raise
        self._data = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        with tarfile.open(self._path, "r|*", tarinfo=_Header) as tar:
            index = _Index(tar, self._data)
        self._data.flush()  # pread goes past Python's buffer
        return index

    def read(self, file: str) -> bytes:
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


class _Index:
    """Where a tar's images lie: in `spool`, to which they are copied, or, without, in the tar."""

    def __init__(self, tar: tarfile.TarFile, spool: IO[bytes] | None) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._folders: set[str] = set()
        while (member := tar.next()) is not None:
            # What tarfile remembers of each member would grow past the index itself.
            cast(Any, tar).members.clear()
            name = posixpath.normpath(member.name).lstrip("/")
            if member.isdir():
                self._folders.add(name)
            elif _wanted(name):
                self._add(tar, member, name, spool)

    def _add(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, spool: IO[bytes] | None
    ) -> None:
        if member.islnk():
            self._links[name] = posixpath.normpath(member.linkname).lstrip("/")
        elif member.issym():
            beside = posixpath.join(posixpath.dirname(name), member.linkname)
            self._links[name] = posixpath.normpath(beside)
        elif member.issparse():
            raise DataError(f"{tar.name} holds {name} as a sparse file: pack it without --sparse")
        elif member.isreg() and spool is None:
            self._places[name] = (member.offset_data, member.size)
        elif member.isreg() and (source := tar.extractfile(member)) and spool is not None:
            self._places[name] = (spool.tell(), member.size)
            shutil.copyfileobj(source, spool)

    def files(self) -> dict[str, tuple[int, int]]:
        """(offset, size) by path without the leading folder. Raises DataError for a stray link."""
        for name, target in self._links.items():
            if target not in self._places:
                raise DataError(f"{name} is a link to {target}, which is no image of the archive")
            self._places[name] = self._places[target]
        skip = len(self._lead())
        return {name[skip:]: place for name, place in self._places.items()}

    def folders(self) -> set[str]:
        """Every folder, also those only implied by a file, without the leading folder."""
        skip = len(self._lead())
        return {folder[skip:] for folder in self._all_folders() if not _hidden(folder[skip:])}

    def _all_folders(self) -> set[str]:
        found = self._folders - {"."}
        for name in self._places:
            folder = posixpath.dirname(name)
            while folder and folder not in found:
                found.add(folder)
                folder = posixpath.dirname(folder)
        return found

    def _lead(self) -> str:
        """'name/' where everything lies in one folder called name that is not itself train/."""
        tops = {folder.split("/")[0] for folder in self._all_folders() if not _hidden(folder)}
        return f"{tops.pop()}/" if len(tops) == 1 and "train" not in tops else ""
