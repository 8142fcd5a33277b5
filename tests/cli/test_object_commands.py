"""Commands on a store in a bucket: the same weights and bytes, resumed, shared, mended, refused."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import environment, start, strata
from remote import TEXT, Remote, both, levels, local_levels
from runs import Place, here, made, tiny
from s3_server import Road, new_bucket, road, use

from strata.store.level.references import references


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same run on a local store. Not to be changed."""
    return made(tmp_path_factory.mktemp("local") / "place", 2, TEXT)


@pytest.fixture
def empty(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Nothing is there yet."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    use(monkeypatch, server)
    (tmp_path / "tiny.toml").write_text(TEXT)
    return Remote(tmp_path, bucket=new_bucket(server))


@pytest.fixture(scope="module")
def finished(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """A finished run, with x_1 and x_2. Not to be changed."""
    root = tmp_path_factory.mktemp("far")
    (root / "tiny.toml").write_text(TEXT)
    place = Remote(root, bucket=new_bucket(server))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, server)
        assert place.do("materialize", "--layer", 2).rc == 0
        yield place


@pytest.fixture
def far(empty: Remote, finished: Remote) -> Remote:
    """A copy of it."""
    files, there = empty.objects.files, finished.objects
    for name, data in levels(there).items():
        files.put(empty.objects.root / name, data)  # pyright: ignore
    shutil.copytree(finished.run, empty.run)
    assert empty.do("materialize", "--layer", 2).out.startswith("nothing to do")
    return empty


@pytest.fixture
def way(server: str, empty: Remote, monkeypatch: pytest.MonkeyPatch) -> Iterator[Road]:
    with road(server) as found:
        use(monkeypatch, found.url)
        yield found


def test_a_run_has_the_weights_and_the_bytes_of_a_local_one(far: Remote, local: Place) -> None:
    assert far.weights() == local.weights()
    assert levels(far.objects) == local_levels(local)
    note = references(far.objects.root, far.objects.files)
    assert [one.run for one in note] == [str(far.run)]
    again = far.do("run", "--json")
    assert again.rc == 0
    assert sorted(path.name for path in far.root.iterdir()) == ["run", "tiny.toml"]


def test_levels_are_read_through_the_cache(finished: Remote) -> None:
    copies = list((finished.root / "cache").iterdir())
    assert sum(path.stat().st_size for path in copies) > 100_000


def test_answers_lost_on_the_way_change_nothing(empty: Remote, way: Road, local: Place) -> None:
    way.lost += [r"PUT .*/c\.0", r"PUT .*/receipts/000001", r"PUT .*/COMMIT", r"PUT .*/intent"]
    way.lost += [r"PUT .*/locks/probe", r"GET .*/c\.1", r"GET .*/COMMIT"]
    assert empty.do("materialize", "--layer", 2).rc == 0
    assert not way.lost
    assert levels(empty.objects) == local_levels(local)
    assert empty.weights() == local.weights()


def test_the_commands_of_a_store(far: Remote) -> None:
    status = far.do("status", "--json").json
    assert status["store"] == far.store
    states = [level["state"] for layer in status["layers"] for level in layer["levels"]]
    assert set(states) == {"complete"}
    assert far.do("verify", "--deep").rc == 0
    assert "x_2 test: 300 of 300 equal" in far.do("audit").out
    assert far.do("plan").rc == 0
    assert far.do("evaluate").rc == 0
    used = here("du", "--store", far.store, "--json").json
    assert used["free_bytes"] is None
    assert {level["runs"][0] for level in used["levels"]} == {str(far.run)}
    assert used["total_bytes"] > sum(level["bytes"] for level in used["levels"]) > 100_000
    assert far.do("explain", "--layer", 1, "--json").json[0]["state"] == "complete"
    assert far.do("probe", "--json").json
    freed = far.do("evict", "--layer", 2, "--json").json["freed"]
    assert freed > 0
    left = here("du", "--store", far.store, "--json").json
    assert left["total_bytes"] == used["total_bytes"] - freed
    assert far.do("materialize", "--layer", 2).rc == 0
    assert far.do("clean", "--yes").rc == 0
    assert not far.run.exists()
    assert here("gc", "--store", far.store, "--delete").rc == 0
    assert levels(far.objects) == {}


def test_gc_removes_what_no_run_uses_and_nothing_else(far: Remote) -> None:
    assert here("gc", "--store", far.store, "--delete", "--json").json["garbage"] == []
    before = levels(far.objects)
    (far.run / "run.json").unlink()
    found = here("gc", "--store", far.store, "--json").json["garbage"]
    assert len(found) == 3
    assert levels(far.objects) == before
    here("gc", "--store", far.store, "--delete")
    assert levels(far.objects) == {}


def test_damage_is_named_and_mended_to_the_same_bytes(far: Remote) -> None:
    before, files = levels(far.objects), far.objects.files
    level = far.level_path(1, "train.plain")
    broken = [level / "x/c.1.0.0.0", level / "receipts/000002.json", level / "x/zarr.json"]
    for path in broken:
        data = bytearray(files.read(path))
        data[50] ^= 4
        files.put(path, bytes(data))  # pyright: ignore
    files.unlink(level / "x/c.0.0.0.0")
    broken.append(level / "x/c.0.0.0.0")
    said = far.do("verify", "--deep", "--json")
    assert said.rc == 10
    assert all(str(path) in said.out for path in broken)
    mended = far.do("verify", "--deep", "--repair")
    assert mended.rc == 0, mended.err
    assert "the same values as before" in mended.out
    assert levels(far.objects) == before


def test_what_lies_beside_the_levels_is_looked_at_too(far: Remote) -> None:
    assert far.do("materialize", "--layer", 2).rc == 0  # leaves its note
    files, root = far.objects.files, far.objects.root
    (name,) = files.names(root / "runs")
    path, stranger = root / "runs" / name, root / "notes.txt"
    data = bytearray(files.read(path))
    data[50] ^= 4
    files.put(path, bytes(data))  # pyright: ignore
    files.put(stranger, b"mine")  # pyright: ignore
    said = far.do("verify", "--deep", "--json")
    assert said.rc == 10
    assert [one["path"] for one in json.loads(said.out)["damaged"]] == [str(path)]
    assert [one["path"] for one in json.loads(said.out)["strange"]] == [str(stranger)]
    assert far.do("verify", "--deep", "--repair").rc == 0
    assert references(root, files)


def test_a_damaged_shard_is_never_trained_from(far: Remote) -> None:
    files, path = far.objects.files, far.level_path(1, "train.plain") / "x/c.1.0.0.0"
    data = bytearray(files.read(path))
    data[50] ^= 4
    files.put(path, bytes(data))  # pyright: ignore
    for cached in (f"{far.root}/new", f"{far.root}/new:10"):
        said = far.do("train", "--layer", 2, "--read-cache", cached)
        assert said.rc == 0  # it is solved
        far_run = ("--run", far.root / "other", "--read-cache", cached)
        said = far.do("train", "--layer", 2, *far_run)
        assert said.rc == 10
        assert str(path) in said.error


@pytest.mark.parametrize("budget", ["1", "300kB"])
def test_a_small_read_cache_changes_no_weight(far: Remote, local: Place, budget: str) -> None:
    """All levels together have more bytes."""
    cache = far.root / "small"
    other = ("--run", far.root / "other", "--read-cache", f"{cache}:{budget}", "--tier", "disk")
    assert far.do("train", "--layer", 2, *other).rc == 0
    again = Remote(far.root, "other", bucket=far.bucket)
    assert again.weights() == local.weights()
    copies = sum(path.stat().st_size for path in cache.iterdir()) if cache.exists() else 0
    assert copies <= 300_000
    assert (copies > 0) == (budget != "1")


# ---- killed, and two at once --------------------------------------------------------------------


def test_after_kill_9_finished_shards_are_not_written_again(
    empty: Remote, way: Road, local: Place
) -> None:
    assert empty.do("train", "--layer", 1).rc == 0
    way.slow, words = r"PUT .*x_1.*/c\.", ("materialize", *empty.options, "--layer", 1)
    with start(empty.root, *words) as process:
        until = time.monotonic() + 60
        while not way.count(r"PUT .*x_1.*/receipts/") and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
    files, level = empty.objects.files, empty.level_path(1, "train.plain")
    there = [name for name in files.names(level / "x") if name.startswith("c.")]
    assert 0 < len(there) < 4
    assert not files.exists(level / "COMMIT.json")
    way.slow = "$^"
    way.seen.clear()
    said = empty.do("materialize", "--layer", 1)
    assert said.rc == 0, said.err
    assert not [name for name in there if way.count(rf"PUT .*train\.plain/x/{re.escape(name)}")]
    assert way.count(r"PUT .*train\.plain/x/c\.") > 0
    x_1 = {n: data for n, data in local_levels(local).items() if not n.startswith("x_2")}
    assert levels(empty.objects) == x_1


@pytest.mark.slow
def test_two_clients_at_once_end_with_one_result(empty: Remote) -> None:
    """That of one process alone with a local store: on as many cores, so that sums agree. Neither
    waits for the other: both may do the work."""
    places = [Remote(empty.root, f"run{i}", bucket=empty.bucket) for i in range(2)]
    said = both(places, "materialize", "--layer", 1)
    assert [result.rc for result in said] == [0, 0], [result.err for result in said]
    alone = Place(empty.root, "alone")
    assert [result.rc for result in both([alone], "materialize", "--layer", 1)] == [0]
    assert levels(empty.objects) == local_levels(alone)
    assert "waiting" not in said[0].err + said[1].err


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "run", "verify", "evict"])
def test_no_bucket_and_nobody_there_are_one_line(
    empty: Remote, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--layer", 1) if command == "evict" else ()
    empty.do("status")
    (empty.root / "tiny.toml").write_text(TEXT)
    absent = Remote(empty.root, bucket=f"absent-{command}")
    made(empty.root / "elsewhere", 1, TEXT)  # a run whose levels would be looked for
    words = ("--run", empty.root / "elsewhere" / "run")
    said = absent.do(command, *words, *more)
    assert said.rc == 11
    assert "there is no such bucket" in said.error
    use(monkeypatch, "http://127.0.0.1:9")
    said = Remote(empty.root, bucket=f"nobody-{command}").do(command, *words, *more)
    assert said.rc == 11
    assert "http://127.0.0.1:9: it cannot be reached" in said.error


def test_du_and_gc_of_no_store(empty: Remote) -> None:
    for command in ("du", "gc"):
        assert here(command, "--store", empty.store).rc == 8
        assert here(command, "--store", f"s3://absent-{command}/p").rc == 11


def test_several_writers_need_a_server_that_tells_them_apart(empty: Remote, way: Road) -> None:
    way.stripped = ("if-none-match",)
    said = empty.do("train", "--layer", 1)
    assert said.rc == 11
    assert "several writers are refused" in said.error
    assert levels(empty.objects) == {}
    alone = here("train", *empty.options, "--layer", 1, "--store", f"{empty.store}?writers=1")
    assert alone.rc == 0, alone.err


@pytest.mark.parametrize("store", ["gs://b/p", "s3://", "s3://b/p?writers=2", "s3://b/p?x=1"])
def test_what_is_no_store_is_a_wrong_option(empty: Remote, store: str) -> None:
    assert here("status", *empty.options, "--store", store).rc == 2


def test_what_an_object_store_cannot_be_asked(empty: Remote) -> None:
    assert empty.do("calibrate").rc == 2
    said = empty.do("train", "--layer", 1, "--loader", "ffcv")
    assert said.rc == 7
    assert "--loader native" in said.error
    assert empty.do("status", "--read-cache", "x:many").rc == 2


def test_features_are_packed_where_the_recipe_leaves_it_open(empty: Remote) -> None:
    (empty.root / "tiny.toml").write_text(tiny(flip="false", layers=2, epochs=1))
    assert empty.do("materialize", "--layer", 1).rc == 0
    used = here("du", "--store", empty.store, "--json").json["levels"]
    ratios = {f"{e['depth'][:3]} {e['level']}": e["value_bytes"] / e["bytes"] for e in used}
    assert ratios["x_1 train.plain"] > 1.5
    shape = empty.objects.geometry(_key(empty))
    assert shape is not None
    assert shape.profile == "zstd"


def _key(place: Remote):
    from strata.pipeline.run import rundir
    from strata.pipeline.run.levels import keys_at

    run = rundir.find(place.run)
    assert run is not None
    return keys_at(run, 1)[0]


def test_looking_does_not_import_the_client_where_no_url_is_named(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from strata.pipeline.commands import inspect;"
        "from strata.pipeline.run import stores; stores.open_store('features');"
        "print([m for m in ('obstore', 'torch') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.strip() == "[]", said.stderr
    assert strata(tmp_path, "status").rc == 0
