"""What is listed of a tree of images and what is left out, the same of a directory and of a tar."""

from __future__ import annotations

import os
import resource
import shutil
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from drawn import facts, noise, opened, pack, pets, refusal, save
from PIL import Image

from strata.pipeline.errors import exit_code
from strata.stages.data.opening import open_whole
from strata.stages.errors import BrokenImage, TemporaryFull

CAFE = "caf\udce9"
"""A name of Latin-1 bytes, as Python gives it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pets(tmp_path / "pets")


def image(path: Path, seed: int = 99, **options: object) -> Path:
    return save(path, Image.fromarray(noise(seed, 12, 12, 3)), **options)


def listed(path: Path) -> tuple[list[str], dict[str, int]]:
    """Names of the training images, and how many files were left out for which reason."""
    with opened(path) as source:
        names = [source.name("train", i) for i in range(source.count("train"))]
        return names, {why: count for why, (count, _) in source.left_out.items()}


def everywhere(folder: Path) -> Iterator[Path]:
    """The folder, and tars of it: plain, compressed, below two folders, with ./ in front."""
    yield folder
    for name, mode, lead in (("a", "w", ""), ("b", "w:gz", "pets"), ("c", "w:xz", "data/set")):
        yield pack(folder, folder.parent / f"{name}.tar", mode, lead)


# ---- what is left out ---------------------------------------------------------------------------


def thumbnails(folder: Path) -> None:
    for i in range(4):
        image(folder / f"train/cat/@eaDir/{i}.JPG/SYNOPHOTO_THUMB_M.jpg")
    image(folder / "train/dog/__MACOSX/1.png")
    image(folder / "train/dog/.thumbnails/1.png")
    (folder / "train/dog/Thumbs.db").write_bytes(b"x")


def hidden(folder: Path) -> None:
    (folder / "train/cat/._0.JPG").write_bytes(b"x")
    image(folder / "train/.cache/dog/1.png")


def texts(folder: Path) -> None:
    for name in ("notes.txt", "README", "labels.csv", "photo.jpg.part"):
        (folder / "train/cat" / name).write_text("Python, P5, BM and GIF are words of a text")
    (folder / "train/cat/raw.NEF").write_bytes(b"II*\0" + bytes(100))


def strays(folder: Path) -> None:
    image(folder / "train/loose.png")


def beside(folder: Path) -> None:
    image(folder / "val/cat/1.png")
    image(folder / "val/dog/1.png")
    (folder / "README.txt").write_text("read me")
    (folder / "more").mkdir()


def loop(folder: Path) -> None:
    (folder / "train/cat/up").symlink_to("..")
    (folder / "train/cat/top").symlink_to("../..")
    (folder / "train/cat/here").symlink_to(".")
    (folder / "train/again").symlink_to(".")


def again(folder: Path) -> None:
    (folder / "train/cat/a.png").symlink_to("1.png")
    (folder / "train/cat/dogs").symlink_to("../dog")
    (folder / "train/wolf").symlink_to("dog")


SYSTEM, AGAIN = "thumbnail or system file", "link to what is listed already"
LEFT_OUT: list[tuple[Callable[[Path], None], dict[str, int]]] = [
    (thumbnails, {SYSTEM: 7}),
    (hidden, {"hidden": 2}),
    (texts, {"no image": 5}),
    (strays, {"outside a class folder": 1}),
    (beside, {"beside train/ and test/": 4}),
    (loop, {AGAIN: 4}),
    (again, {AGAIN: 3}),
]


@pytest.mark.parametrize(("more", "told"), LEFT_OUT, ids=lambda case: getattr(case, "__name__", ""))
def test_what_is_left_out_is_counted_by_reason(
    folder: Path, more: Callable[[Path], None], told: dict[str, int]
) -> None:
    want = facts(opened(folder))
    more(folder)
    for path in everywhere(folder):
        assert listed(path)[1] == told
        assert facts(opened(path)) == want


def test_an_empty_class_is_named_with_what_was_left_out(folder: Path) -> None:
    (folder / "train/emu").mkdir()
    (folder / "train/emu/bird.heic").write_bytes(bytes(4) + b"ftypheic")
    assert refusal(folder).endswith("Left out: 1 no image, such as train/emu/bird.heic")


# ---- types --------------------------------------------------------------------------------------


def test_images_are_known_by_content_where_their_suffix_says_nothing(folder: Path) -> None:
    kinds = {"JPEG": "a", "PNG": "b.dat", "GIF": "c.JPEG.bin", "BMP": "d.1", "WEBP": "e.x"}
    kinds |= {"TIFF": "f.image", "PPM": "g.p"}
    for number, (kind, name) in enumerate(kinds.items()):
        image(folder / "train/cat" / name, number, format=kind)
    image(folder / "train/cat/photo.JPEG.jpg", 20, format="WEBP")
    want = facts(opened(folder))
    for path in everywhere(folder):
        names, left_out = listed(path)
        assert {f"train/cat/{name}" for name in kinds.values()} < {*names}
        assert "train/cat/photo.JPEG.jpg" in names
        assert left_out == {}
        assert facts(opened(path)) == want


def test_a_text_with_the_suffix_of_an_image_is_broken(folder: Path) -> None:
    (folder / "train/cat/text.jpg").write_text("not an image")
    for path in everywhere(folder):
        with opened(path) as source:
            number = [source.name("train", i) for i in range(9)].index("train/cat/text.jpg")
            with pytest.raises(BrokenImage, match="not an image"):
                source.image("train", number)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "train/cat/pipe.jpg")
    for path in everywhere(folder):
        assert listed(path)[1] == {"neither file nor folder": 1}


# ---- links --------------------------------------------------------------------------------------


def test_links_to_folders_and_files_give_the_same_in_a_tar(folder: Path) -> None:
    """A class, a folder below a class, a split and images that lie elsewhere in the tree."""
    (folder / "train/dog").rename(folder / "pool")
    (folder / "train/dog").symlink_to("../pool")
    image(folder / "blobs/12ab", 31, format="PNG")
    image(folder / "blobs/more/1.png", 32)
    (folder / "train/cat/blob.jpg").symlink_to("../../blobs/12ab")
    (folder / "train/cat/more").symlink_to("../../train/../links/one")
    (folder / "links").mkdir()
    (folder / "links/one").symlink_to("../blobs/more")
    (folder / "test").rename(folder / "held")
    (folder / "val").symlink_to("held")
    want = facts(opened(folder))
    assert want[1][4:7] == ["train/cat/blob.jpg", "train/cat/more/1.png", "train/dog/0.JPG"]  # type: ignore[index]
    assert want[2] == {"train": [0] * 6 + [1] * 4, "test": [0] * 2 + [1] * 2}
    for path in everywhere(folder):
        assert facts(opened(path)) == want


def test_folders_that_link_to_each_other_are_listed_once(folder: Path) -> None:
    """Each of eight has links to all others: there are more paths than could ever be walked."""
    for a in range(8):
        image(folder / f"train/k{a}/1.png", 40 + a)
        for b in range(8):
            (folder / f"train/k{a}/to{b}").symlink_to(f"../k{b}")
    for path in everywhere(folder):
        names, left_out = listed(path)
        assert len(names) == 8 + 8
        assert left_out == {AGAIN: 64}


def test_a_second_link_to_an_image_elsewhere_is_left_out(folder: Path, tmp_path: Path) -> None:
    outside = image(tmp_path / "elsewhere/1.png", 50)
    for name in ("train/cat/a.png", "train/dog/b.png", "test/cat/c.png"):
        (folder / name).symlink_to(outside)
    names, left_out = listed(folder)
    assert "train/cat/a.png" in names
    assert "train/dog/b.png" not in names
    assert left_out == {AGAIN: 1}, "what lies in test is not what lies in train"


def test_hard_links_are_files_and_in_a_linked_folder_the_first_counts(folder: Path) -> None:
    first = image(folder / "pool/b.png", 50)
    for name in ("c", "a", "d"):
        (folder / f"pool/{name}.png").hardlink_to(first)
    (folder / "train/cat/real.png").hardlink_to(folder / "train/cat/1.png")
    (folder / "train/cat/pool").symlink_to("../../pool")
    for path in everywhere(folder):
        names, left_out = listed(path)
        assert [name for name in names if "pool" in name] == ["train/cat/pool/a.png"]
        assert "train/cat/real.png" in names
        assert left_out[AGAIN] == 3


def test_a_link_counts_as_an_image_by_its_own_name_or_by_content(folder: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / "blobs/1").write_text("no image")
    (folder / "blobs/2.jpg").write_text("no image")
    image(folder / "blobs/3.txt", 60, format="PNG")
    for number, name in enumerate(("1.jpg", "2", "3"), 1):
        target = "2.jpg" if number == 2 else "3.txt" if number == 3 else "1"
        (folder / "train/cat" / f"link-{name}").symlink_to(f"../../blobs/{target}")
    for path in everywhere(folder):
        names, left_out = listed(path)
        linked = [name for name in names if "link" in name]
        assert linked == ["train/cat/link-1.jpg", "train/cat/link-3"]
        assert left_out == {"beside train/ and test/": 1, "no image": 1}
        with opened(path) as source, pytest.raises(BrokenImage):
            source.image("train", names.index(linked[0]))


@pytest.mark.parametrize("target", ["/etc", "../../../elsewhere", "gone", "me"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_link_out_of_a_tar_is_refused_by_name(
    folder: Path, tmp_path: Path, target: str, mode: str
) -> None:
    (folder / "train/cat/me").symlink_to(target)
    told = refusal(pack(folder, tmp_path / "a.tar", mode))
    assert told.startswith("train/cat/me is a link to ")
    assert "not in the tar, or to itself" in told


def test_a_link_to_nothing_in_a_directory_is_a_broken_image_or_left_out(folder: Path) -> None:
    (folder / "train/cat/a.jpg").symlink_to("gone")
    (folder / "train/cat/notes").symlink_to("notes")
    names, left_out = listed(folder)
    assert "train/cat/a.jpg" in names
    assert left_out == {"link to nothing": 1}


def test_a_file_below_a_file_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("train/a", "train/a/1.png"):
            tar.addfile(tarfile.TarInfo(name))
    assert "train/a/1.png, but a is no folder" in refusal(tmp_path / "a.tar")


# ---- names --------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_can_be_shown(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "cat").rename(folder / split / CAFE)
    (folder / "train/dog" / f"{CAFE}.jpg").write_text("broken")
    (folder / "train/dog" / f"{CAFE}.txt").write_text("left out")
    for path in everywhere(folder):
        with opened(path) as source:
            assert source.classes == ("caf\\xe9", "dog")
            assert source.left_out == {"no image": (1, "train/dog/caf\\xe9.txt")}
            assert source.name("train", 8) == f"train/dog/{CAFE}.jpg"


def test_two_spellings_of_one_class(folder: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "chat\u00f4") for form in ("NFC", "NFD"))
    (folder / "train/cat").rename(folder / "train" / composed)
    (folder / "test/cat").rename(folder / "test" / apart)
    told = "spells one class in two ways, 'chat\\xf4' and 'chato\\u0302'"
    for path in everywhere(folder):
        assert told in refusal(path)
    (folder / "test" / apart).rename(folder / "train" / apart)
    assert "in two ways" in refusal(folder)


def test_another_case_is_named(folder: Path) -> None:
    (folder / "test/cat").rename(folder / "test/Cat")
    assert refusal(folder).endswith("not in train/, which has cat")


# ---- what lies there ----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["set", "data/set", "my/data/set"])
def test_train_deeper_down_is_found(folder: Path, tmp_path: Path, depth: str) -> None:
    place = tmp_path / "whole" / depth
    place.parent.mkdir(parents=True)
    folder.rename(place)
    told = refusal(tmp_path / "whole")
    assert f"found {depth}/train/. Give --data imagefolder:{place}" in told
    (tmp_path / "whole/another").mkdir()  # so a tar has no single folder to pass over
    packed = pack(tmp_path / "whole", tmp_path / "a.tar", "w")
    assert f"found {depth}/train/. Unpack it and give" in refusal(packed)


def test_what_lies_there_instead_of_train_and_test(folder: Path, tmp_path: Path) -> None:
    (folder / "test").rename(folder / "held")
    for path in everywhere(folder):
        told = refusal(path)
        assert "has no folder test/ or val/. Left out: 1 beside train/, such as held. Pass" in told
    photos = tmp_path / "photos"
    for i in range(3):
        image(photos / f"{i}.png")
    assert "no folder train/, it holds 3 files, such as 0.png. Images belong" in refusal(photos)
    shutil.rmtree(folder / "held")
    (folder / "train").rename(photos / "all")
    assert "has no folder train/, it holds all/ and 3 files, such as" in refusal(photos)


def test_class_folders_alone_are_one_split(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    for path in everywhere(folder):
        with open_whole(f"imagefolder:{path}", root=Path()) as source:
            under_train = [source.name("train", i) for i in range(source.count("train"))]
            labels = source.labels("train").tolist()
    for kind in ("cat", "dog"):
        (folder / "train" / kind).rename(folder / kind)
    (folder / "train").rmdir()
    image(folder / "loose.png")
    for path in everywhere(folder):
        with open_whole(f"imagefolder:{path}", root=Path()) as source:
            assert source.splits == ("train",)
            found = [source.name("train", i) for i in range(source.count("train"))]
            assert [f"train/{name}" for name in found] == under_train
            assert source.labels("train").tolist() == labels
            assert source.left_out == {"outside a class folder": (1, "loose.png")}
        assert "Pass --split 0.2, or set data.split = 0.2" in refusal(path)
    (folder / "emu").mkdir()
    assert "class emu has no images in" in refusal(folder)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_test_folder(folder: Path, name: str) -> None:
    classes, _, labels, images, _ = facts(opened(folder))
    (folder / "test").rename(folder / name)
    for path in everywhere(folder):
        found = facts(opened(path))
        assert (found[0], found[2], found[3]) == (classes, labels, images)


PACKED = {"zip": b"PK\3\4", "rar": b"Rar!\x1a\7", "7z": b"7z\xbc\xaf\x27\x1c"}
PACKED["zstd"] = b"(\xb5/\xfd"


@pytest.mark.parametrize(("kind", "head"), PACKED.items())
def test_other_archives_are_named(tmp_path: Path, kind: str, head: bytes) -> None:
    path = tmp_path / "images.tar"
    path.write_bytes(head + bytes(range(256)) * 8)
    assert refusal(path).startswith(f"{path} is packed as {kind}, which is not read: unpack it")


def test_arrays_and_folders_taken_for_each_other(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    assert refusal(tmp_path / "a.npz").endswith(f"holds arrays: --data npz:{tmp_path / 'a.npz'}")
    assert refusal(folder, "npz").endswith(f"but a folder: --data imagefolder:{folder}")
    assert "(it is an image)" in refusal(folder / "test/cat/1.png")


# ---- the temporary directory --------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of its own, in which files can hold 1,000 bytes."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield place
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("packed", ["w:gz", "w:xz"])
def test_a_full_temporary_directory_says_how_much_is_needed(
    folder: Path, request: pytest.FixtureRequest, packed: str
) -> None:
    nbytes = sum(path.stat().st_size for path in folder.rglob("*.*"))
    path = pack(folder, folder.parent / "a.tar", packed)
    place = request.getfixturevalue("temporary")
    with pytest.raises(TemporaryFull) as caught:
        opened(path)
    assert f"its images take {nbytes:,} bytes in the temporary directory {place}" in str(
        caught.value
    )
    assert "Set TMPDIR to a directory with room" in str(caught.value)
    assert list(place.iterdir()) == []
    assert exit_code(caught.value) == 6


def test_no_temporary_directory_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(folder, folder.parent / "a.tar", "w:gz")
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "gone"))
    with pytest.raises(TemporaryFull, match=r"no temporary file: .*No such file.*gone"):
        opened(path)
