"""Tables and tars of samples: CSV, Hugging Face's data sets, parquet, WebDataset."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import Form, facts, opened, pets, refusal

from strata.stages.data.images import read, survey
from strata.stages.data.opening import open_source, open_whole
from strata.stages.data.sources import Source
from strata.stages.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return pets(tmp_path / "pets")


def same(source: Source, root: Path) -> None:
    """A source has the classes, labels and images of the class folders."""
    classes, _, labels, images, _ = facts(source)
    want = facts(opened(root))
    assert (classes, labels, images) == (want[0], want[2], want[3])


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.*"))


# ---- CSV ----------------------------------------------------------------------------------------


def written(root: Path, lines: list[str], name: str = "a.csv", encoding: str = "utf-8") -> Path:
    (root / name).write_text("\n".join(lines) + "\n", encoding)
    return root / name


@pytest.mark.parametrize("head", ["path,label,split", "Split,File,class,path_of_mask", ""])
def test_csv(root: Path, head: str) -> None:
    lines = [head] * bool(head)
    for file in files(root):
        path, kind, split = file.relative_to(root), file.parent.name, file.parent.parent.name
        row = f"{split}, {path},{kind},x" if head.startswith("Split") else f"{path},{kind},{split}"
        lines.append(row)
    same(opened(written(root, lines, encoding="utf-8-sig"), "csv"), root)


def test_csv_of_one_split_and_numbers(root: Path) -> None:
    lines = [f"{file.relative_to(root)},{i / 4}" for i, file in enumerate(files(root))]
    with open_whole(f"csv:{written(root, lines)}", root=root) as source:
        assert (source.splits, source.classes) == (("train",), ("0",))
        np.testing.assert_array_equal(source.labels("train"), np.arange(12, dtype=np.float32) / 4)
    assert "has no test split. Pass --split 0.2" in refusal(root / "a.csv", "csv")


def test_csv_of_several_labels_names_them(root: Path) -> None:
    lines = [f"{file.relative_to(root)},{i % 2},{i % 3 // 2}" for i, file in enumerate(files(root))]
    with open_whole(f"csv:{written(root, ['file,sun,rain', *lines])}", root=root) as source:
        assert source.classes == ("sun", "rain")
        assert source.labels("train").shape == (12, 2)
        assert source.labels("train").dtype == np.float32


def test_csv_of_npy_files(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", x[i])
    lines = [f"{i}.npy,{i % 2},{'test' if i > 1 else 'train'}" for i in range(4)]
    path = written(tmp_path, lines)
    with open_source(f"csv:{path}", root=tmp_path, form=Form((2, 5), "float32")) as source:
        np.testing.assert_array_equal(np.asarray(read(source, "test", 1)[0]), x[3], strict=True)


def test_csv_signature_follows_every_file(root: Path) -> None:
    lines = [f"{file.relative_to(root)},1,{file.parent.parent.name}" for file in files(root)]
    with opened(written(root, lines), "csv") as source:
        before = source.signature()
        os.utime(files(root / "test")[0], ns=(1, 1))
        assert source.signature() != before


def test_a_file_that_a_csv_names_in_vain_is_broken(root: Path) -> None:
    lines = ["path,label,split", "nix.png,cat,train"]
    lines += [f"{f.relative_to(root)},{f.parent.name},{f.parent.parent.name}" for f in files(root)]
    with opened(written(root, lines), "csv") as source:
        with pytest.raises(DataError, match=r"train/nix\.png \(No such file or directory\)"):
            survey(source, skip_broken=False)
        assert survey(source, skip_broken=True).kept["train"].tolist() == list(range(1, 9))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([""], "must have rows of path,label or path,label,split"),
        (["path,label"], "must have rows of path,label"),
        (["path,split", "a,train"], "must have rows of path,label"),
        (["path,label", "a,1,2"], "row 2, has 3 cells, must be 2"),
        (["path,label,split", "a,1,dawn"], "has the splits 'dawn'; they must be train, and"),
        (["path,label,split", "a,1,test"], "has the splits 'test'; they must be train, and"),
        (["path,label,split", "a,1,train", "b,1,training"], "the splits 'train', 'training'; they"),
        (["path,label", "a,-1"], "column label of"),
    ],
)
def test_csv_refused(tmp_path: Path, lines: list[str], told: str) -> None:
    assert told in refusal(written(tmp_path, lines), "csv")


def test_csv_of_another_encoding(tmp_path: Path) -> None:
    assert "cannot be read as CSV" in refusal(written(tmp_path, ["é,1"], encoding="latin-1"), "csv")
    assert "cannot be read as CSV" in refusal(tmp_path / "nix.csv", "csv")


# ---- Hugging Face -------------------------------------------------------------------------------


def tables(root: Path, **features: Any) -> Any:
    """Hugging Face's tables of the class folders, by split."""
    import datasets

    kinds = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])}
        | features
    )
    found = {}
    for split in ("train", "test"):
        rows = files(root / split)
        held: dict[str, Any] = {"img": [{"bytes": f.read_bytes(), "path": f.name} for f in rows]}
        held["fine_label"] = [("cat", "dog").index(f.parent.name) for f in rows]
        held |= {name: list(range(len(rows))) for name in features}
        found[split] = datasets.Dataset.from_dict(held, kinds)
    return found


def test_a_saved_data_set(root: Path, tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict(tables(root)).save_to_disk(str(tmp_path / "saved"))
    same(opened(tmp_path / "saved", "hf"), root)
    (tmp_path / "saved/test/state.json").write_text("{")
    assert "saved cannot be read" in refusal(tmp_path / "saved", "hf")


def test_a_saved_data_set_of_one_split(root: Path, tmp_path: Path) -> None:
    tables(root)["train"].save_to_disk(str(tmp_path / "saved"))
    with open_whole(f"hf:{tmp_path / 'saved'}", root=root) as source:
        assert (source.splits, source.classes) == (("train",), ("cat", "dog"))
        before = source.signature()
        (tmp_path / "saved/state.json").touch()
        assert source.signature() != before


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_by_the_words_in_front(root: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "data"
    place.mkdir()
    for split, table in tables(root).items():
        for part in range(2):
            name = place / f"{split.replace('test', 'validation')}-{part:05}-of-00002.{kind}"
            own = table.shard(2, part, contiguous=True)
            if kind == "parquet":
                own.to_parquet(str(name))
            else:
                own.save_to_disk(str(tmp_path / "one"))
                (made,) = (tmp_path / "one").glob("*.arrow")
                made.rename(name)
    same(opened(place, "hf"), root)
    one = sorted(place.glob("train*"))[0]
    with open_whole(f"hf:{one}", root=root) as source:
        assert (source.splits, source.count("train")) == (("train",), 4)


def test_columns_that_are_named(root: Path, tmp_path: Path) -> None:
    import datasets

    parts = tables(root, age=datasets.Value("float32"))
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    with opened(f"{tmp_path / 'saved'}?label=age&image=img", "hf") as source:
        np.testing.assert_array_equal(source.labels("test"), np.arange(4, dtype=np.float32))
    told = refusal(f"{tmp_path / 'saved'}?label=nix", "hf")
    assert "has no column nix: it has img, fine_label, age. Name it: hf:" in told


def test_arrays_of_a_table(tmp_path: Path) -> None:
    import datasets

    x = np.random.default_rng(0).normal(size=(6, 2, 5)).astype(np.float32)
    kinds = datasets.Features(
        {"x": datasets.Array2D((2, 5), "float32"), "y": datasets.Value("int64")}
    )
    held = {"x": list(x), "y": [0, 1, 0, 1, 0, 1]}
    datasets.Dataset.from_dict(held, kinds).save_to_disk(str(tmp_path / "saved"))
    form = Form((2, 5), "float32", split=0.5)
    with open_source(f"hf:{tmp_path / 'saved'}", root=tmp_path, form=form) as source:
        i = int(source.name("train", 1).partition("/")[2])
        np.testing.assert_array_equal(np.asarray(read(source, "train", 1)[0]), x[i], strict=True)


def test_without_the_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(root, "hf") == "hf: needs the package datasets: pip install 'strata[hf]'"


def test_no_tables(root: Path) -> None:
    assert "holds no .parquet or .arrow file" in refusal(root, "hf")
    (root / "a.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in refusal(root / "a.parquet", "hf")


# ---- WebDataset ---------------------------------------------------------------------------------


def packed(path: Path, parts: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in parts:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(root: Path, kind: str) -> list[tuple[str, bytes]]:
    found = []
    for i, file in enumerate(files(root)):
        label = file.parent.name
        told = json.dumps({"label": label, "i": i}) if kind == "json" else label
        stem = f"some/{i:04}"
        found += [(f"{stem}.mask.png", b"x"), (f"{stem}{file.suffix}", file.read_bytes())]
        found += [(f"{stem}.{kind}", told.encode())]
    return found


@pytest.mark.parametrize("kind", ["cls", "label", "json"])
def test_tars_by_the_words_in_front(root: Path, tmp_path: Path, kind: str) -> None:
    train = samples(root / "train", kind)
    packed(tmp_path / "train-000.tar", train[:12])
    packed(tmp_path / "train-001.tar", train[12:])
    packed(tmp_path / "val-000.tar", samples(root / "test", kind))
    same(opened(tmp_path, "webdataset"), root)
    same(opened(tmp_path / "*.tar", "webdataset"), root)
    with open_whole(f"webdataset:{tmp_path}/train-{{000..001}}.tar", root=root) as source:
        assert (source.splits, source.count("train")) == (("train",), 8)
        assert source.name("train", 0) == "train/some/0000"


def test_numbers_and_arrays_in_tars(tmp_path: Path) -> None:
    parts = []
    for i in range(4):
        np.save(held := io.BytesIO(), np.full((2, 3), i, np.float32))
        parts += [(f"{i}.npy", held.getvalue()), (f"{i}.target", f"{i / 2}".encode())]
    path = packed(tmp_path / "a.tar", parts)
    form = Form((2, 3), "float32", split=0.25)
    with open_source(f"webdataset:{path}", root=tmp_path, form=form) as source:
        assert source.labels("train").dtype == np.float32
        for i in range(3):
            value, label = np.asarray(read(source, "train", i)[0]), source.labels("train")[i]
            assert (value == 2 * label).all()


def test_what_is_no_sample_in_a_tar_is_counted(root: Path, tmp_path: Path) -> None:
    parts = [
        *samples(root / "train", "cls"),
        ("some/9.cls", b"cat"),
        ("x.png", b"x"),
        ("y.png", b""),
    ]
    with open_whole(f"webdataset:{packed(tmp_path / 'a.tar', parts)}", root=root) as source:
        assert source.count("train") == 8
        assert source.left_out == {"without an image": (1, "some/9"), "without a label": (2, "x")}


def test_tars_refused(root: Path, tmp_path: Path) -> None:
    assert "names no file" in refusal(tmp_path / "nix-{0..3}.tar", "webdataset")
    path = packed(tmp_path / "a.tar", samples(root / "train", "cls"))
    path.write_bytes(path.read_bytes()[:9000])
    assert "a.tar cannot be read as a tar" in refusal(path, "webdataset")
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    assert "A compressed one must be unpacked first" in refusal(tmp_path / "b.tar", "webdataset")
    packed(tmp_path / "c.tar", [("1.png", b"x"), ("1.json", b'{"caption": 1}')])
    assert "1.json in" in refusal(tmp_path / "c.tar", "webdataset")


def test_a_broken_image_in_a_tar(root: Path, tmp_path: Path) -> None:
    parts = samples(root, "cls")
    parts[4] = parts[4][0], b"not an image"
    form = Form((), "uint8", split=0.3)
    path = packed(tmp_path / "a.tar", parts)
    with (
        open_source(f"webdataset:{path}", root=root, form=form) as source,
        pytest.raises(DataError, match=r"train/some/0001 \(not an image in a known format\)"),
    ):
        survey(source, skip_broken=False)
