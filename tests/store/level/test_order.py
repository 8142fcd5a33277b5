"""Orders, fingerprints, seals and sizes: the same words give the same numbers in every run."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import examples

from strata.store.errors import LevelDamaged
from strata.store.files.publish import sealed, unseal
from strata.store.fingerprint import canonical, differences, digest_arrays, fingerprint
from strata.store.level.layout import CHUNK_BYTES, PRECISIONS, geometry
from strata.store.read.order import Mixing, batch_count, batches, generator, key_of

QUICK = settings(max_examples=examples(50), deadline=None)


def epoch_order(rows: int, seed: int, depth: int, epoch: int) -> np.ndarray:
    return Mixing(rows).order(seed, depth, epoch)


# --- orders --------------------------------------------------------------------------------------


@QUICK
@given(rows=st.integers(0, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_an_epoch_visits_every_row_once(rows: int, seed: int, epoch: int) -> None:
    order = epoch_order(rows, seed, 3, epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(rows))
    np.testing.assert_array_equal(order, epoch_order(rows, seed, 3, epoch))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((100, 1, 1, 2), id="another seed"),
        pytest.param((100, 0, 2, 2), id="another depth"),
        pytest.param((100, 0, 1, 3), id="another epoch"),
        pytest.param((100, 0, 2, 1), id="depth and epoch exchanged"),
    ],
)
def test_another_key_gives_another_order(other: tuple[int, int, int, int]) -> None:
    assert not np.array_equal(epoch_order(100, 0, 1, 2), epoch_order(*other))


def test_the_order_is_the_one_that_earlier_runs_had() -> None:
    """A run that is taken up again must go on in the order it began with."""
    assert epoch_order(10, 0, 1, 2).tolist()[:5] == [5, 7, 2, 8, 1]


def test_the_draws_are_those_that_earlier_runs_had() -> None:
    assert key_of("augment", 0) == 107143810520777539497311014326829368672
    drawn = generator("augment", 0).random(2).tolist()
    assert drawn == [0.26402753556853054, 0.263087739013795]


def parts(rows: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    ends = np.cumsum(lengths, dtype=int)
    return [rows[end - length : end] for end, length in zip(ends, lengths, strict=True)]


@QUICK
@given(rows=st.integers(0, 200), batch=st.integers(1, 60), data=st.data())
def test_batches_are_the_order_cut_up(rows: int, batch: int, data: st.DataObject) -> None:
    order, drop_last = epoch_order(rows, 0, 0, 0), data.draw(st.booleans())
    cut = parts(*batches(order, batch, drop_last=drop_last))
    assert len(cut) == batch_count(rows, batch, drop_last=drop_last)
    for number, found in enumerate(cut):
        expected = order[number * batch :][:batch]
        assert found.tolist() == sorted(expected.tolist())
    sizes = [len(found) for found in cut]
    rest = [] if drop_last or rows % batch == 0 else [rows % batch]
    assert sizes == [batch] * (rows // batch) + rest
    start = data.draw(st.integers(0, len(cut) + 1))
    tail = parts(*batches(order, batch, drop_last=drop_last, start=start))
    assert [found.tolist() for found in tail] == [found.tolist() for found in cut[start:]]


@QUICK
@given(few=st.integers(0, 50), more=st.integers(0, 50), seed=st.integers(0, 2**63))
def test_a_row_of_draws_does_not_depend_on_how_many_follow(few: int, more: int, seed: int) -> None:
    short = generator("view", seed).random((few, 3))
    long = generator("view", seed).random((few + more, 3))
    assert short.tobytes() == long[:few].tobytes()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(("a", "bc"), ("ab", "c"), id="where a word ends"),
        pytest.param(("a", "b"), ("b", "a"), id="the order of words"),
        pytest.param(("a", 1), ("a", "1"), id="a number and its text"),
        pytest.param(("a",), ("a", ""), id="an empty word"),
        pytest.param((12, 3), (1, 23), id="where a number ends"),
    ],
)
def test_keys_tell_words_apart(one: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
    assert key_of(*one) != key_of(*other)
    assert generator(*one).random() != generator(*other).random()


# --- fingerprints --------------------------------------------------------------------------------

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@QUICK
@given(value=st.dictionaries(TEXT, JSON, max_size=5))
def test_the_order_of_keys_does_not_matter(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical(backwards) == canonical(value)
    assert canonical({"outer": backwards}) == canonical({"outer": value})
    assert json.loads(canonical(value)) == value


def test_the_canonical_text() -> None:
    assert canonical({"b": [1, 1.0, None], "a": "é"}) == '{"a":"é","b":[1,1.0,null]}'.encode()
    assert fingerprint({}) == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_json_has_no_number_for_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"deep": [number]})


@QUICK
@given(index=st.integers(0, 11), towards=st.sampled_from([-np.inf, np.inf]))
def test_one_ulp_changes_the_digest(index: int, towards: float) -> None:
    weights = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    changed = weights.copy()
    changed.flat[index] = np.nextafter(weights.flat[index], np.float32(towards))
    assert digest_arrays({"w": weights}) == digest_arrays({"w": weights.copy()})
    assert digest_arrays({"w": weights}) != digest_arrays({"w": changed})


ZEROS = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"v": ZEROS}, id="another name"),
        pytest.param({"w": ZEROS.reshape(3, 2)}, id="another shape"),
        pytest.param({"w": ZEROS.reshape(6)}, id="fewer axes"),
        pytest.param({"w": ZEROS.view(np.int32)}, id="another type of the same bytes"),
        pytest.param({"w": -ZEROS}, id="the other zero"),
        pytest.param({"w": ZEROS, "x": ZEROS[:0]}, id="one more, of no bytes"),
        pytest.param({}, id="none"),
    ],
)
def test_names_types_and_shapes_are_in_the_digest(other: dict[str, np.ndarray]) -> None:
    assert digest_arrays(other) != digest_arrays({"w": ZEROS})


def test_how_arrays_lie_in_memory_is_not_in_the_digest() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest_arrays({"a": rows, "b": ZEROS}) == digest_arrays(
        {"b": ZEROS, "a": np.asfortranarray(rows)}
    )


@pytest.mark.parametrize(
    ("was", "now", "lines"),
    [
        pytest.param({"a": {"b": [1]}}, {"a": {"b": [1]}}, [], id="nothing"),
        pytest.param(
            {"schedule": {"epochs": 12, "batch": 8}},
            {"schedule": {"epochs": 50, "batch": 8}},
            ["schedule.epochs: was 12, is 50"],
            id="a leaf two levels down",
        ),
        pytest.param({}, {"new": "x"}, ['new: was nothing, is "x"'], id="a key that is new"),
        pytest.param({"old": 1}, {}, ["old: was 1, is nothing"], id="a key that is gone"),
        pytest.param(
            {"a": {"b": 1}}, {"a": 2}, ['a: was {"b": 1}, is 2'], id="a branch and a leaf"
        ),
        pytest.param(
            {"b": 1, "a": 1}, {"a": 2, "b": 2}, ["a: was 1, is 2", "b: was 1, is 2"], id="two"
        ),
    ],
)
def test_differences_name_the_path(was: object, now: object, lines: list[str]) -> None:
    assert differences(was, now) == lines


# --- files that prove themselves -----------------------------------------------------------------

BODIES = st.dictionaries(TEXT, NUMBERS | TEXT | st.lists(NUMBERS | st.none(), max_size=3))


@QUICK
@given(body=BODIES, data=st.data())
def test_a_changed_byte_never_changes_what_a_sealed_file_says(
    tmp_path_factory: pytest.TempPathFactory, body: dict[str, object], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "sealed"
    text = bytearray(sealed(body))
    path.write_bytes(text)
    assert unseal(path) == body
    text[data.draw(st.integers(0, len(text) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(text)
    with contextlib.suppress(LevelDamaged):
        assert canonical(unseal(path)) == canonical(body)  # white space, or 1e5 for 1E5


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"[]", id="no record"),
        pytest.param(b'{"body": 1}', id="no hash"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(sealed({"rows": 11}).replace(b"11", b"12"), id="another number"),
        pytest.param(sealed({"rows": 11}).replace(b"rows", b"Rows"), id="another key"),
        pytest.param(sealed({"rows": 11}).replace(b"11", b"NaN"), id="a number JSON lacks"),
    ],
)
def test_what_does_not_hash_to_itself_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(LevelDamaged, match="does not match its own sha256"):
        unseal(tmp_path / "a")


# --- the size of files ---------------------------------------------------------------------------


@QUICK
@given(
    rows=st.integers(1, 10_000),
    sample=st.tuples(st.integers(1, 300), st.integers(1, 99), st.integers(1, 99)),
    name=st.sampled_from(sorted(PRECISIONS)),
    size=st.integers(1, 64 << 20),
)
def test_chunks_and_shards_stay_below_their_aims(
    rows: int, sample: tuple[int, int, int], name: str, size: int
) -> None:
    shape = geometry(rows, sample, name, size)
    assert shape.shard_rows % shape.chunk_rows == 0
    assert shape.chunk_rows * shape.row_bytes <= max(CHUNK_BYTES, shape.row_bytes)
    assert shape.shard_rows * shape.row_bytes <= max(size, shape.row_bytes)
    assert shape.shard_rows < rows + shape.chunk_rows
    ranges = [shape.shard_range(shard) for shard in range(shape.shards)]
    assert [0, *(last for _, last in ranges)] == [*(first for first, _ in ranges), rows]


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        pytest.param((3, 32, 32), (85, 85 * 32), id="chunks of a mebibyte, shards of 32 MiB"),
        pytest.param((64, 128, 128), (1, 8), id="a row larger than a chunk should be"),
    ],
)
def test_chosen_geometry(sample: tuple[int, int, int], expected: tuple[int, int]) -> None:
    shape = geometry(50_000, sample, "float32", 32 << 20)
    assert (shape.chunk_rows, shape.shard_rows) == expected
