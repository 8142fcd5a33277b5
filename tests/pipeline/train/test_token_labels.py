"""Labels of tokens: in any order in memory, in finals whose logits are not kept, and in probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
from runs import Place

from strata.stages.solve import evaluate

SMALL: dict[str, Any] = {"train": 320, "test": 64, "depth": 2, "epochs": 1}


def test_order_in_memory_is_not_seen(tmp_path: Path) -> None:
    """Arrays that lie first axis first are the same data, and so the same x_0."""
    found = []
    for name, lie in (("rows", np.ascontiguousarray), ("columns", np.asfortranarray)):
        place = Place(tmp_path / name)
        texts.written(place.root, **SMALL)
        with np.load(place.root / "text.npz") as stored:
            arrays = {key: lie(stored[key]) for key in stored}
        np.savez(place.root / "text.npz", **arrays)  # pyright: ignore
        assert place.do("train", "--layer", 1).rc == 0
        found.append(place.overview().existing().nodes()[0].fingerprint)
    assert found[0] == found[1]


def test_finals_are_told_where_logits_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 1)
    place = Place(tmp_path / "place")
    texts.written(place.root, **SMALL)
    assert place.do("run").rc == 0
    assert place.do("final", "--vary", "lr=0.1,0.3").rc == 0
    finals = place.do("evaluate", "--json").json["finals"]
    assert [one["name"] for one in finals] == ["lr=0.1", "lr=0.3"]
    assert all(0 < one["test"]["loss"] < np.log(128) for one in finals)
    assert place.do("report").rc == 0


def test_a_probe_of_token_labels_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path / "place")
    texts.written(place.root, **SMALL)
    assert place.do("train", "--layer", 1).rc == 0
    said = place.do("probe", "--layer", 1)
    assert said.rc == 2
    assert "every token has its own ('data.targets' is 'token')" in said.err
    assert "fake_tensor" not in capfd.readouterr().err
