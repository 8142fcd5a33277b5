"""Class folders in a tar as a source, and opening a directory or a tar."""

from __future__ import annotations

import errno
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, cast

from strata.stages.data import folders
from strata.stages.data.folders import FILE, FOLDER, LINK, Directory, ImageFolder, is_image
from strata.stages.data.sources import short_reason, stamp
from strata.stages.errors import DataError, TemporaryFull

_OTHERS = re.compile(
    rb"(?P<zip>PK\x03\x04|PK\x05\x06)|(?P<rar>Rar!)|(?P<_7z>7z\xbc\xaf\x27\x1c)"
    rb"|(?P<zstd>\x28\xb5\x2f\xfd)|(?P<lz4>\x04\x22\x4d\x18)|(?P<lzip>LZIP)|(?P<compress>\x1f\x9d)"
)
_MOST_STEPS = 1000
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TMPDIR = "Set TMPDIR to a directory with room, or unpack it and give the folder"


def open_imagefolder(path: Path) -> ImageFolder:
    """The class folders of a directory or tar (plain or compressed); see ImageFolder."""
    if path.is_dir():
        return Directory(path)
    if path.is_file():
        return Archive(path)
    raise DataError(f"there is no directory or tar {path}")


class _Link(NamedTuple):
    """A link of a tar: the folders it lies in, and where it leads from there."""

    at: tuple[str, ...]
    target: str


_Node = dict[str, Any] | tuple[int, int] | _Link | str
"""An entry of a tar: a folder by name, offset and size of an image, a link, or the kind of what is
left out."""


class Archive(ImageFolder):
    """A tar, read at random by offset. A place is a node of its tree.

    A plain one is read in place. A compressed one cannot be, so its images, still encoded, are
    copied once into an anonymous temporary file. Links are followed within the tar. Folders above
    train/ are passed over where each is the only one. Raises TemporaryFull, too.
    """

    instead = ". Sample files of WebDataset are --data webdataset:{title}"
    deeper = "Unpack it and give --data imagefolder:…/{path}, or pack that folder alone"

    def __init__(self, path: Path) -> None:
        self._path, self._tree = path, cast(dict[str, Any], {})
        self._data: IO[bytes] | None = None
        try:
            self._index()
            root, above = self._tree, [id(self._tree)]
            while root.keys().isdisjoint(("train", *folders.TEST)):
                inner = [n for name, n in root.items() if not folders.why_hidden(name)]
                inner = [node for node in inner if isinstance(node, dict)]
                if len(inner) != 1:
                    break
                root = inner[0]
                above.append(id(root))
            super().__init__(str(path), root, above)
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            self.close()
            raise DataError(_what_it_is(path, error)) from error
        except BaseException:
            self.close()
            raise
        self._tree = {}

    def _index(self) -> None:
        """Fill the tree. Opens the file that is read from then on."""
        try:
            with tarfile.open(self._path, "r:", tarinfo=Header) as tar:
                self._data = self._path.open("rb")
                _fill(self._tree, tar, None)
                return
        except tarfile.ReadError:
            if self._data is not None:  # a plain tar after all, but damaged
                raise
        try:
            self._data = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        except OSError as error:
            raise TemporaryFull(
                f"{self._path} is compressed, and has no temporary file: {error}. {_TMPDIR}"
            ) from error
        with tarfile.open(self._path, "r|*", tarinfo=Header) as tar:
            needed = _fill(self._tree, tar, self._data)
        if needed:
            self.close()
            free = shutil.disk_usage(place := tempfile.gettempdir()).free
            raise TemporaryFull(
                f"{self._path} is compressed, and its images take {needed:,} bytes in the temporary"
                f" directory {place}, where {free:,} are free. {_TMPDIR}"
            )

    def _read(self, file: str) -> bytes:
        assert self._data is not None
        start, size = self._places[file]
        return os.pread(self._data.fileno(), size, start)

    def _list(self, path: str, folder: dict[str, Any]) -> list[folders.Entry]:
        return [(name, _kind(node), node) for name, node in folder.items()]

    def _follow(self, path: str, link: _Link) -> tuple[str, Any]:
        node = _target(self._tree, link, path)
        if node == folders.NO_IMAGE and is_image(path):
            node = (id(link), 0)  # a broken image, which its name says it is
        return _kind(node), node

    def _head(self, path: str, place: tuple[int, int]) -> bytes:
        assert self._data is not None
        return os.pread(self._data.fileno(), min(folders.HEAD, place[1]), place[0])

    def _identity(self, path: str, place: Any) -> Hashable:
        return id(place) if isinstance(place, dict) else place

    def signature(self) -> str:
        return stamp(("archive",), [self._path.resolve()])

    def close(self) -> None:
        if self._data is not None:
            with suppress(OSError):  # what could not be written is not missed
                self._data.close()


class Header(tarfile.TarInfo):
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


def _fill(tree: dict[str, Any], tar: tarfile.TarFile, spool: IO[bytes] | None) -> int:
    """Put a tar's entries into its tree. Images lie in the tar, or in `spool`, to which they are
    copied. Once that is full, they are only counted: returns the bytes that it would need, or 0.

    Raises DataError for a hard link to nothing, and for a sparse image.
    """
    hard: list[tuple[str, _Link]] = []
    copied, full = 0, False
    while (member := tar.next()) is not None:
        # What tarfile remembers of each member would grow past the index itself.
        cast(Any, tar).members.clear()
        name = posixpath.normpath(member.name).lstrip("/")
        node: _Node = folders.SPECIAL
        if member.isdir():
            node = {}
        elif member.issym():
            outside = member.linkname.startswith("/")
            at = ("..",) if outside else tuple(name.split("/")[:-1])
            node = _Link(at, member.linkname)
        elif member.islnk():
            hard.append((name, _Link((), member.linkname)))
        elif member.issparse() and is_image(name):
            raise DataError(f"{tar.name} holds {name} as a sparse file: pack it without --sparse")
        elif member.isreg() and not spool and is_image(name):
            node = (member.offset_data, member.size)
        elif member.isreg() and (file := tar.extractfile(member)):
            head = file.read(folders.HEAD)
            node = (member.offset_data, member.size) if is_image(name, head) else folders.NO_IMAGE
            if spool and node != folders.NO_IMAGE:
                node, copied = (copied, member.size), copied + member.size
                try:
                    if not full:
                        spool.write(head)
                        shutil.copyfileobj(file, spool)
                        spool.flush()
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    full = True
        _put(tree, name, node)
    for name, link in hard:
        _put(tree, name, _target(tree, link, name))
    return copied if full else 0


def _put(tree: dict[str, Any], name: str, node: _Node) -> None:
    """Put an entry into the tree; the last of a name counts, as when a tar is unpacked."""
    *folders, last = name.split("/")
    for part in folders:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise DataError(f"the tar holds {name}, but {part} is no folder there")
    if not (last in (".", "") or (isinstance(node, dict) and isinstance(tree.get(last), dict))):
        tree[last] = node


def _target(tree: dict[str, Any], link: _Link, path: str) -> Any:
    """The node that a link leads to. Raises DataError, naming `path`, where there is none."""
    chain: list[Any] = [tree]
    steps = [*link.at, *link.target.split("/")][::-1]
    for _ in range(_MOST_STEPS):
        if not steps or not chain or chain[-1] is None:
            break
        step = steps.pop()
        found = chain[-1].get(step) if isinstance(chain[-1], dict) else None
        if step == "..":
            chain.pop()
        elif isinstance(found, _Link):
            chain, steps = [tree], steps + [*found.at, *found.target.split("/")][::-1]
        elif step not in ("", "."):
            chain.append(found)
    if steps or not chain or chain[-1] is None:
        where = posixpath.normpath("/".join((*link.at, link.target)))
        raise DataError(f"{path} is a link to {where}, which is not in the tar, or to itself")
    return chain[-1]


def _kind(node: _Node) -> str:
    if isinstance(node, str):
        return node
    return FOLDER if isinstance(node, dict) else LINK if isinstance(node, _Link) else FILE


def _what_it_is(path: Path, error: Exception) -> str:
    """Why a file cannot be read as a tar: what it is instead, by its first bytes, or the error."""
    try:
        with path.open("rb") as file:
            head = file.read(folders.HEAD)
    except OSError:
        head = b""
    if not (known := _OTHERS.match(head)):
        image = " (it is an image)" if is_image("", head) else ""
        return f"{path} cannot be read as a tar{image}: {short_reason(error)}"
    if path.suffix == ".npz":
        return f"{path} holds arrays: --data npz:{path}"
    return (
        f"{path} is packed as {(known.lastgroup or '').strip('_')}, which is not read: unpack it "
        "and give the folder that holds train/ and test/, or pack that as .tar"
    )
