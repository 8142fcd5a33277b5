"""Class folders in directories and tars, and what is refused."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest
from drawn import facts, opened, pack, pets, refusal, save
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pets(tmp_path / "pets")


def test_directory_and_tars_are_the_same_data_set(folder: Path, tmp_path: Path) -> None:
    want = facts(opened(folder))
    assert want[0] == ("cat", "dog")
    assert want[2] == {"train": [0] * 4 + [1] * 4, "test": [0] * 2 + [1] * 2}
    assert want[1][0] == "train/cat/0.JPG"  # type: ignore[index]
    for name, mode, lead in (
        ("a.tar", "w", ""),
        ("b.tar", "w", "pets"),
        ("c.tar.gz", "w:gz", "pets"),
        ("d.tar.xz", "w:xz", ""),
    ):
        assert facts(opened(pack(folder, tmp_path / name, mode, lead))) == want


def test_val_does_for_test_and_folders_may_nest(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    save(folder / "train/dog/more/x.jpg", Image.new("L", (3, 3)))
    with opened(folder) as source:
        assert source.name("test", 0) == "val/cat/0.JPG"
        assert source.name("train", 8) == "train/dog/more/x.jpg"


def test_a_test_folder_without_labels_is_passed_over_for_val(folder: Path, tmp_path: Path) -> None:
    """As ImageNet is packed: its test images lie in one folder, without classes."""
    (folder / "test").rename(folder / "val")
    save(folder / "test/ILSVRC2012_test_00000001.JPEG", Image.new("L", (3, 3)))
    for path in (folder, pack(folder, tmp_path / "a.tar", "w")):
        with opened(path) as source:
            assert (source.count("test"), source.name("test", 0)) == (4, "val/cat/0.JPG")
    shutil.rmtree(folder / "val")
    save(folder / "val/ILSVRC2012_val_00000001.JPEG", Image.new("L", (3, 3)))
    assert "they belong into a folder for each class, such as cat/" in refusal(folder)


def test_files_that_are_no_images_are_passed_over(folder: Path) -> None:
    for name in (".hidden.jpg", "Thumbs.db", "notes.txt", ".DS_Store"):
        (folder / "train/cat" / name).write_bytes(b"x")
    (folder / "train/.cache").mkdir()
    with opened(folder) as source:
        assert source.count("train") == 8


def test_hard_and_symbolic_links_in_a_tar(folder: Path, tmp_path: Path) -> None:
    (folder / "train/dog/hard.png").hardlink_to(folder / "train/cat/1.png")
    (folder / "train/dog/soft.png").symlink_to("../cat/1.png")
    want = facts(opened(folder))
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        assert facts(opened(pack(folder, tmp_path / name, mode))) == want


def test_a_stray_link_in_a_tar(folder: Path, tmp_path: Path) -> None:
    (folder / "train/dog/soft.png").symlink_to("gone.png")
    path = pack(folder, tmp_path / "a.tar", "w")
    assert "train/dog/soft.png is a link to train/dog/gone.png" in refusal(path)


def test_a_missing_path(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone") == f"there is no directory or tar {tmp_path / 'gone'}"


@pytest.mark.parametrize("data", [b"", b"hello" * 1000, b"\x1f\x8b\x08" + b"\0" * 40], ids=len)
def test_a_file_that_is_no_tar(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert f"{path} cannot be read as a tar" in refusal(path)


@pytest.mark.parametrize(("name", "mode"), [("a", "w"), ("a", "w:gz"), ("a", "w:xz")])
def test_a_tar_cut_short(folder: Path, tmp_path: Path, name: str, mode: str) -> None:
    path = pack(folder, tmp_path / name, mode)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        # Within a header and between two members, where tarfile takes it for the end.
        header = [member for member in tar if member.isfile()][7].offset
    cuts = [header, header + 100] if mode == "w" else []
    for cut in (*cuts, len(data) // 3, len(data) // 2):
        path.write_bytes(data[:cut])
        assert f"{path} cannot be read as a tar" in refusal(path)


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("train", "has no folder train/"),
        ("test", "has no folder test/ or val/"),
        ("train/cat", "class cat is only in the test split"),
    ],
)
def test_a_missing_folder(folder: Path, tmp_path: Path, gone: str, told: str) -> None:
    shutil.rmtree(folder / gone)
    assert told in refusal(folder)
    assert told in refusal(pack(folder, tmp_path / "a.tar", "w"))


def test_an_empty_class_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "train/emu").mkdir()
    assert "class emu has no images under train/" in refusal(folder)
    assert "class emu has no images under train/" in refusal(pack(folder, tmp_path / "a.tar", "w"))


def test_empty_splits(folder: Path, tmp_path: Path) -> None:
    assert "has no folder train/" in refusal(tmp_path / "pets/train/cat")
    shutil.rmtree(folder / "test/cat")
    shutil.rmtree(folder / "test/dog")
    assert "the test split of" in refusal(folder)
    shutil.rmtree(folder / "train/cat")
    shutil.rmtree(folder / "train/dog")
    assert "is empty" in refusal(folder)


def test_a_class_may_miss_from_test(folder: Path) -> None:
    shutil.rmtree(folder / "test/cat")
    with opened(folder) as source:
        assert source.labels("test").tolist() == [1, 1]


def test_signature_follows_files(folder: Path, tmp_path: Path) -> None:
    tar = pack(folder, tmp_path / "a.tar", "w")
    for path, touched in ((folder, folder / "test/dog/1.png"), (tar, tar)):
        with opened(path) as source:
            before = source.signature()
            assert source.signature() == before
            os.utime(touched, ns=(1, 1))
            assert source.signature() != before
