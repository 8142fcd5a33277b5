"""Class folders under train/ and test/ as a source: what is listed, and what is left out."""

from __future__ import annotations

import heapq
import io
import os
import re
import stat
import unicodedata
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from strata.stages.data.sources import Source, printable, stamp, summary
from strata.stages.errors import DataError

HEAD = 16
"""The first bytes of a file, which tell its type."""
FOLDER, FILE, LINK = "folder", "file", "link"
NO_IMAGE, SPECIAL, NOWHERE = "no image", "neither file nor folder", "link to nothing"
_AGAIN = "link to what is listed already"
Entry = tuple[str, str, Any]
"""Name, kind (FOLDER, FILE, LINK, or why it is left out) and place of an entry of a folder."""

TEST = ("test", "val", "valid", "validation")
"""Folders to test with, the first that has images."""
_SUFFIXES = frozenset(("jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"))
# What cameras keep begins as a TIFF does, but all that can be read of it is a thumbnail.
_RAW = frozenset(("3fr", "arw", "cr2", "dng", "erf", "kdc", "nef", "nrw", "pef", "srw"))
_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|RIFF.{4}WEBP|II[*+]\0|MM\0[*+]"
    rb"|P[1-6]\s+[#\d]|P[Ff]\n|.{4}ftypavi[fs]|\0\0\0\x0cjP  \r\n",
    re.DOTALL,
)
_SYSTEM = re.compile(
    r"@eadir|\.?@__thumb|\.thumbnails|\.thumbs|__macosx|\.appledouble|\.ipynb_checkpoints"
    r"|(eh)?thumbs\.db|desktop\.ini|\.ds_store|[#@]recycle|\$recycle\.bin|lost\+found",
    re.IGNORECASE,
)


def is_image(name: str, head: bytes = b"") -> bool:
    """Does a file count as an image: by the suffix of its name, or else by its first bytes?"""
    suffix = name.rpartition(".")[2].lower()
    return suffix in _SUFFIXES or (suffix not in _RAW and bool(_IMAGE.match(head)))


def why_hidden(name: str) -> str:
    """Why an entry of this name is not looked at; empty if it is."""
    if _SYSTEM.fullmatch(name):
        return "thumbnail or system file"
    return "hidden" if name.startswith(".") else ""


class ImageFolder(Source):
    """A tree of images as a source: classes and files each in sorted order.

    Without train/, and without test/ and val/, its folders are the classes of one split.
    Files and folders go by their slashed path from the folder that holds train/, or them. Links are
    followed after all else, and what they lead to a second time, within a split, is left out, as is
    what is hidden, a thumbnail, or no image by suffix or content. Raises DataError when there is no
    train/ and no two folders with images, a class has no images, or test has another class.

    A subclass says where an entry lies, its place, and lists folders by it. `root` is the place of
    the folder that holds train/ or the classes; `above` are the identities of it and of those above
    it.
    """

    without_test = "no folder test/ or val/"
    deeper = "Give --data imagefolder:{title}/{path}"
    """What to do where train/ lies deeper."""
    instead = ""
    """What else may lie there."""

    def __init__(self, title: str, root: Any, above: Iterable[Hashable]) -> None:
        self._title, self._above = title, frozenset(above)
        self._left_out: dict[str, tuple[int, str]] = {}
        self._listed: list[str] = []
        there = {name: (kind, place) for name, kind, place in self._list("", root)}
        there[""] = "", root
        for top in ("train", *TEST):
            if there.get(top, ("", None))[0] == LINK:
                there[top] = self._follow(top, there[top][1])
        tops = [top for top in ("train", *TEST) if there.get(top, ("", None))[0] == FOLDER]
        train, deeper = ("train" if tops else ""), "" if tops else next(self._with_train(root), "")
        self._depth = len(train) // 5  # of class folders
        walked = {} if deeper else {top: self._walk(top, there[top][1]) for top in tops or [""]}
        folders, images = walked.get(train, ({}, {}))
        kinds = [path for path in folders if path and path.count("/") == self._depth]
        if train not in walked or not (tops or (images and len(kinds) > 1)):
            raise DataError(printable(self._without_train(there, deeper)))
        # ImageNet has both, and what lies in test/ has no classes.
        test = next((top for top in tops[1:] if walked[top][1]), (*tops, "", "")[1])
        for name in there.keys() - {"", "train", test} if tops else ():
            others = walked[name][1] if name in walked else () if why_hidden(name) else (name,)
            for path in others:
                self._leave_out(f"beside train/{f' and {test}/' * bool(test)}", path)
        self.left_out = dict(sorted(self._left_out.items()))
        classes = sorted(path.rpartition("/")[2] for path in kinds)
        found = {"train": walked[train][1]} | ({"test": walked[test][1]} if test else {})
        order = {
            split: sorted((path.split("/")[self._depth], path) for path in paths)
            for split, paths in found.items()
        }
        self._check_classes(classes, *({kind for kind, _ in each} for each in order.values()))
        number = {name: label for label, name in enumerate(classes)}
        labels = {s: np.array([number[kind] for kind, _ in each]) for s, each in order.items()}
        super().__init__(title, labels, map(printable, classes))
        self._names = {split: [name for _, name in each] for split, each in order.items()}
        self._places = {path: place for each in found.values() for path, place in each.items()}

    def name(self, split: str, i: int) -> str:
        return self._names[split][i]

    @abstractmethod
    def _read(self, file: str) -> bytes:
        """The bytes of one file. Raises OSError."""

    def open_sample(self, split: str, i: int) -> tuple[bytes, Image.Image]:
        if not (data := self._read(self._names[split][i])):
            raise ValueError("the file is empty")
        return data, Image.open(io.BytesIO(data))

    @abstractmethod
    def _list(self, path: str, folder: Any) -> list[Entry]:
        """What a folder holds."""

    @abstractmethod
    def _follow(self, path: str, link: Any) -> tuple[str, Any]:
        """Kind and place of what a link leads to. Raises DataError where it is out of reach."""

    @abstractmethod
    def _identity(self, path: str, place: Any) -> Hashable:
        """A value that a file or folder has whatever the path to it."""

    @abstractmethod
    def _head(self, path: str, place: Any) -> bytes:
        """The first bytes of a file."""

    def _walk(self, top: str, place: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The places of the folders and of the images of a split, by path."""
        folders: dict[str, Any] = {}
        images: dict[str, Any] = {}
        links: list[tuple[str, Any]] = []
        seen: set[Hashable] = set()  # identities, as soon as a link may repeat one
        todo = [(top, FOLDER, place, "")]
        while todo or links:
            if todo:
                path, kind, place, why = todo.pop()
            else:
                both = () if seen else (*folders.items(), *images.items())
                seen |= {*self._above, *(self._identity(*each) for each in both)}
                path, link = heapq.heappop(links)
                kind, place = self._follow(path, link)
                why = ""
            why = why or why_hidden(path.rpartition("/")[2])
            if seen and not why and kind in (FOLDER, FILE):
                key = self._identity(path, place)
                why = _AGAIN if key in seen else ""
                seen.add(key)
            if kind == FOLDER and why != _AGAIN:
                if not why:
                    folders[path] = place
                inside = sorted(self._list(path, place), key=itemgetter(0), reverse=True)
                todo += [(f"{path}/{name}".lstrip("/"), k, at, why) for name, k, at in inside]
            elif kind == LINK and not why:
                heapq.heappush(links, (path, place))
            elif why or kind != FILE:
                self._leave_out(why or kind, path)
            elif not (is_image(path) or is_image(path, self._head(path, place))):
                self._leave_out(NO_IMAGE, path)
            else:
                self._listed.append(path)
                if path.count("/") > self._depth:
                    images[path] = place
                else:
                    self._leave_out("outside a class folder", path)
        return folders, images

    def _leave_out(self, reason: str, path: str) -> None:
        count, first = self._left_out.get(reason, (0, printable(path)))
        self._left_out[reason] = count + 1, min(first, printable(path))

    def _without_train(self, there: dict[str, tuple[str, Any]], path: str) -> str:
        """Why a tree without train/ and without class folders is refused: what it holds instead."""
        if path:
            advice = self.deeper.format(title=self._title, path=path)
            return f"{self._title} has no folder train/, found {path}/train/. {advice}"
        named = ((name, kind) for name, (kind, _) in there.items() if name and name[0] != ".")
        shown = sorted((name, kind == FILE) for name, kind in named)
        folders = [f"{name}/" for name, is_file in shown if not is_file]
        files = [name for name, is_file in shown if is_file]
        holds = ", ".join(folders[:5] + ["…"] * (len(folders) > 5))
        holds += f"{' and ' * bool(holds)}{len(files)} files, such as {files[0]}" if files else ""
        return (
            f"{self._title} has no folder train/, it holds {holds or 'nothing'}. Images belong "
            "into CLASS/, a folder for each class; or into train/CLASS/, and those to test with "
            f"into test/CLASS/ or val/CLASS/{self.instead.format(title=self._title)}"
        )

    def _with_train(self, root: Any, most: int = 1000) -> Iterator[str]:
        """Paths of folders that hold train/, down to three levels; not all where there are many."""
        todo = [("", root)]
        for path, place in todo:  # which grows
            for name, kind, at in sorted(self._list(path, place), key=itemgetter(0)):
                if kind == FOLDER and name == "train" and path:
                    yield path
                elif kind == FOLDER and path.count("/") < 2 and len(todo) < most:
                    todo.append((f"{path}/{name}".lstrip("/"), at))

    def _check_classes(
        self, classes: list[str], train: set[str], test: set[str] | None = None
    ) -> None:
        """Raise DataError unless every class has images in train, test, if it is there, has some
        and no others, and no two names are one in two spellings."""
        title = self._title
        why = f". Left out: {told}" if (told := summary(self.left_out)) else ""
        if not classes:
            raise DataError(f"train/ in {title} is empty: it must hold one folder per class{why}")
        if bare := [kind for kind in classes if kind not in train]:
            name = printable(bare[0])
            under = "under train/ in" if self._depth else "in"
            raise DataError(f"class {name} has no images {under} {title}{why}")
        if test is not None and not test:
            raise DataError(
                f"the test split of {title} has no images: they belong into a folder for each "
                f"class, such as {printable(classes[0])}/{why}"
            )
        test = test or set()
        by_spelling: dict[str, str] = {}
        for kind in (*classes, *sorted(test - train)):
            other = by_spelling.setdefault(unicodedata.normalize("NFC", kind), kind)
            if other != kind:
                raise DataError(f"{title} spells one class in two ways, {other!a} and {kind!a}")
        for kind in sorted(test - train):
            near = [one for one in classes if one.casefold() == kind.casefold()]
            raise DataError(
                f"class {printable(kind)} is only in the test split of {title}, not in train/"
                f"{f', which has {near[0]}' if near else ''}"
            )


class Directory(ImageFolder):
    """Class folders on disk. A place is the identity of what a link leads to, or None."""

    def __init__(self, root: Path) -> None:
        self._root, resolved = root, root.resolve()
        above = (self._identity(str(path), None) for path in (resolved, *resolved.parents))
        super().__init__(str(root), None, above)

    def _read(self, file: str) -> bytes:
        return (self._root / file).read_bytes()

    def _list(self, path: str, folder: Hashable) -> list[Entry]:
        try:
            with os.scandir(self._root / path) as entries:
                return [(entry.name, _kind(entry), None) for entry in entries]
        except OSError as error:
            raise DataError(
                f"the folder {error.filename} cannot be read: {error.strerror}"
            ) from error

    def _follow(self, path: str, link: None) -> tuple[str, Hashable]:
        try:
            found = (self._root / path).stat()
        except OSError:  # named as a broken image, if it looks like one
            return FILE if is_image(path) else NOWHERE, path
        regular = FILE if stat.S_ISREG(found.st_mode) else SPECIAL
        return FOLDER if stat.S_ISDIR(found.st_mode) else regular, (found.st_dev, found.st_ino)

    def _identity(self, path: str, place: Hashable) -> Hashable:
        return place or self._follow(path, None)[1]

    def _head(self, path: str, place: Hashable) -> bytes:
        with suppress(OSError), (self._root / path).open("rb", buffering=0) as file:
            return file.read(HEAD)
        return b""

    def signature(self) -> str:
        root = self._root.resolve()
        return stamp(("directory",), (root / file for file in sorted(self._listed)))


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return LINK
    if entry.is_dir(follow_symlinks=False):
        return FOLDER
    return FILE if entry.is_file(follow_symlinks=False) else SPECIAL
