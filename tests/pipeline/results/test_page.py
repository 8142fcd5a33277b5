"""The report page: what it says, that it stands alone, and that odd reports do not break it."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from strata.pipeline.recipe import builtin
from strata.pipeline.recipe.recipe import parse
from strata.pipeline.recipe.tables import Claim
from strata.pipeline.results import figures
from strata.pipeline.results.report import _claim, render

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = '<script>alert("$x")</script>'


def _epoch(layer: int, epoch: int) -> dict[str, Any]:
    right = 1 - 0.4 / (layer + epoch)
    return {
        "epoch": epoch,
        "lr": 0.1 / epoch,
        "train_loss": 2.0 / (layer + epoch),
        "train_top1": right,
        "test_top1": right - 0.01 if epoch % 2 else None,
        "seconds": 1.5,
    }


def _layer(number: int, top5: float | None) -> dict[str, Any]:
    own, joint = 0.9 + 0.0123 * number, 0.905 + 0.0123 * number
    best = {"top1": joint, "top5": top5}
    levels = [("train.plain", 1437, 1_234_567), ("test.plain", 360, 309_000)]
    return {
        "layer": number,
        "shape": [32, 10, 10],
        "parameters": 12_345,
        "auxiliary_parameters": 45_678,
        "train": {"loss": 0.12, "top1": 0.991},
        "test": {"loss": 0.23, "top1": own, "top5": top5},
        "ensemble": {"logits": best | {"top1": joint - 0.001}, "probabilities": best},
        "epochs": [_epoch(number, epoch) for epoch in range(1, 9)],
        "solve_seconds": 75.2,
        "samples_per_second": 1234.5,
        **dict.fromkeys(("peak_memory_bytes", "compression", "quantiser")),
        "levels": [
            {"level": name, "state": "complete", "rows": rows, "bytes": size}
            | {"seconds": 0.5, "written": size}
            for name, rows, size in levels
        ],
    }


def _probe(kind: str, images: str | None, spread: float | None) -> dict[str, Any]:
    point = {"depth": 1, "test": 0.8, "train": 1.0, "spread": spread, "runs": 2 if spread else 1}
    return {"of": "greedy", "images": images, "kind": kind, "metric": "top1", "points": [point]}


def _matrix(classes: int) -> list[list[int]]:
    cells = [[0] * classes for _ in range(classes)]
    for row in range(classes):
        cells[row][row] = 33
        cells[row][(row * 3 + 1) % classes] += 1 + row % 3
    return cells


def _report(layers: int = 4, classes: int = 10, top5: float | None = None) -> dict[str, Any]:
    steps = [{"step": "write x_0", "seconds": 0.004, "bytes": 460_000}]
    for number in range(1, layers + 1):
        steps.append({"step": f"solve layer {number}", "seconds": 75.2, "bytes": 0})
        steps.append({"step": f"write x_{number}", "seconds": 0.4, "bytes": 1_543_567})
    return {
        "name": "digits",
        "recipe": {
            "data": {"source": "digits", "size": [8, 8]},
            "augment": {},
            "network": {"width": 32, "head": {"kind": "mlp", "depth": 2}},
            "auxiliary": {"convolutions": 0, "bias": True},
            "schedule": {"lr": 0.1, "drops": None},
        },
        "seed": 0,
        "created": "2026-11-23T05:00:00Z",
        "device": "cpu",
        "compute": "float32",
        "machine": {"processor": "Xeon", "cores": 2, "memory_bytes": 25e9, "gpu": None},
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "data": {
            "source": "digits",
            "digest": "ab12cd34",
            "train": 1437,
            "test": 360,
            "classes": [str(one) for one in range(classes)],
            "broken": [],
        },
        "claim": {"text": "The aim.", "last": 88.3, "ensemble": 99.4, "source": "Table 2"}
        | {"last_top5": None, "ensemble_top5": 50.0},
        "layers": [_layer(number, top5) for number in range(1, layers + 1)],
        "confusion": {"of": "ensemble (probabilities)", "matrix": _matrix(classes)},
        "probes": [_probe("linear", None, 0.01), _probe("cnn-2", "imagefolder:flowers", None)],
        "steps": steps,
        "outcomes": [],
        "seconds": 345.6,
    }


def _unfinished() -> dict[str, Any]:
    return _report(layers=0) | {"confusion": None, "steps": [], "probes": []}


def _without_epochs() -> dict[str, Any]:
    report = _report(layers=2)
    for layer in report["layers"]:
        layer["epochs"] = []
    return report


def _hostile() -> dict[str, Any]:
    report = _report(layers=1)
    names = [HOSTILE, "$a_b$", "\\$", "漢字", "--><b>", "", "a\nb", "\x07", "&amp;", "x" * 80]
    report["data"] |= {"classes": names, "broken": [f"{HOSTILE}.jpg: truncated"]}
    report["probes"] = [_probe("linear", name, None) for name in names]
    report["claim"]["text"] = report["name"] = report["steps"][0]["step"] = HOSTILE
    report["recipe"]["data"] = {HOSTILE: [HOSTILE]}
    report["confusion"]["of"] = f'" onload="{HOSTILE}'
    return report


REPORTS = {
    "full": _report(),
    "top5": _report(layers=7, classes=100, top5=0.995),
    "thousand classes": _report(layers=2, classes=1000, top5=0.995),
    "one layer": _report(layers=1),
    "no layers": _unfinished(),
    "no epochs": _without_epochs(),
    "hostile": _hostile(),
}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render(report) for name, report in REPORTS.items()}


class _Balance(HTMLParser):
    """Collects the tags a page opens, and complains where one is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in VOID else self.open

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_well_formed_with_unique_ids(pages: dict[str, str], name: str) -> None:
    parser = _Balance()
    parser.feed(pages[name])
    parser.close()
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert "script" not in parser.seen


@pytest.mark.parametrize("name", REPORTS)
def test_page_stands_alone_and_stays_small(pages: dict[str, str], name: str) -> None:
    links = set(re.findall(r"\w+=\"https?://[^\"]*\"|https?://[^\"\s<]*", pages[name]))
    assert all(link.startswith(('xmlns="', 'xlink="')) for link in links)
    assert len(pages[name].encode()) < 600_000


@pytest.mark.parametrize("name", REPORTS)
def test_figures_are_xml_with_a_label(pages: dict[str, str], name: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", pages[name], flags=re.DOTALL)
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
    expected = {"no layers": 0, "no epochs": 4}
    assert len(drawn) == expected.get(name, 5)


@pytest.mark.parametrize("name", ["one layer", "full"])
def test_curves_stand_before_lines_across_whatever_the_number_of_layers(
    pages: dict[str, str], name: str
) -> None:
    drawn = re.search(r"<svg(?:(?!</svg>).)*training-figure.*?</svg>", pages[name], flags=re.DOTALL)
    assert drawn is not None
    assert drawn[0].count(figures.STYLE["grid.color"]) >= 6


def test_same_report_gives_the_same_page(pages: dict[str, str]) -> None:
    assert render(copy.deepcopy(REPORTS["full"])) == pages["full"]


def test_rendering_leaves_the_report_alone() -> None:
    report = _report(layers=1)
    before = copy.deepcopy(report)
    render(report)
    assert report == before


def test_headline_and_claim(pages: dict[str, str]) -> None:
    text = pages["full"]
    for words in ("94.9 %", "95.4 %", "6.2 MB", "5 min 46 s", "2026-11-23 05:00 UTC", "1,437"):
        assert words in text
    for words in ("The aim.", "(Table 2)", "88.3 %", "+6.6 points", "\N{MINUS SIGN}4.0 points"):
        assert words in text
    assert "Ensemble, top-5" in text
    assert "Last layer, top-5" not in text, "nothing is claimed of it"


def test_many_test_images_earn_a_second_decimal() -> None:
    report = _report(layers=1)
    report["data"]["test"] = 10_000
    assert "91.23 %" in render(report)


def test_without_claim_the_section_is_left_out() -> None:
    report = _report(layers=1)
    report["claim"] = dict.fromkeys(report["claim"], None) | {"text": ""}
    assert "Claim" not in render(report)


def test_unfinished_run_says_so(pages: dict[str, str]) -> None:
    assert "No layer has been solved yet." in pages["no layers"]
    assert "Confusion matrix" not in pages["no layers"]


def test_what_codes_lose_is_told_only_of_codes() -> None:
    report = _report()
    assert "Signal to noise" not in render(report)
    lost = {"median_snr_db": 45.12, "worst_channel": 6, "worst_snr_db": 41.5}
    report["layers"][1]["quantiser"] = lost | {"clipped": 0.00012, "dead": 2, "channels": 64}
    told = render(report)
    assert all(text in told for text in ("45.12 dB", "6: 41.5 dB", "0.012 %", "2 of 64"))


def test_top5_columns_only_where_measured(pages: dict[str, str]) -> None:
    assert "Top-5" not in pages["full"]
    assert "99.5 %" in pages["top5"]


def test_hostile_names_are_escaped(pages: dict[str, str]) -> None:
    assert "<script" not in pages["hostile"]
    assert "&lt;script&gt;" in pages["hostile"]
    assert "1 unreadable file left out" in pages["hostile"]


def test_commonest_mistakes_are_named(pages: dict[str, str]) -> None:
    assert "2 taken for 7 (3), 5 taken for 6 (3), 8 taken for 5 (3)." in pages["full"]


def test_recipe_values_read_as_words(pages: dict[str, str]) -> None:
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', pages["full"])
    said = dict(rows)
    assert said["size"] == "8, 8"
    assert said["head.kind"] == "mlp"
    assert (said["bias"], said["drops"], said["lr"]) == ("yes", "—", "0.1")


def test_thousand_classes_are_pooled(pages: dict[str, str]) -> None:
    assert "Each cell pools 5 × 5 classes." in pages["thousand classes"]
    assert "… and 800 more." in pages["thousand classes"]


def test_a_claim_is_the_recipes_it_was_made_for() -> None:
    _, text, _ = builtin.text_of("cifar10-k1")
    own = parse(text, "copy")
    assert _claim(own) == own.claim
    changed = parse(text.replace("epochs = 50", "epochs = 5"), "copy")
    assert _claim(changed) == Claim()
    other = text.replace("last = 88.3", "last = 60.0").replace("epochs = 50", "epochs = 5")
    assert _claim(parse(other, "copy")).last == 60.0


@pytest.mark.parametrize(
    ("loss", "found", "said"),
    [
        ("bce", {"map": 0.7123}, ["Layer 4, mAP", "71.2 %", "mAP against depth"]),
        ("mse", {"r2": 0.8317, "rmse": 1.25}, ["Layer 4, R²", "0.832", "<th>RMSE</th>", "1.250"]),
        ("mine.py:loss", {}, ["Layer 4, Loss", "0.230"]),
    ],
)
def test_other_losses_have_metrics_of_their_own(
    loss: str, found: dict[str, float], said: list[str]
) -> None:
    report = _report()
    report["recipe"]["loss"], report["confusion"] = {"name": loss}, None
    report["claim"] |= dict.fromkeys(("last", "ensemble", "ensemble_top5"))
    for layer in report["layers"]:
        none = {"top1": None, "top5": None}
        layer["train"]["top1"] = None
        layer["test"] = {"loss": 0.23, **none, **found}
        layer["ensemble"] = dict.fromkeys(("logits", "probabilities"), none | found)
        for epoch in layer["epochs"]:
            del epoch["test_top1"]
            epoch |= {"train_top1": None, "test_loss": 0.3}
            epoch |= {f"test_{name}": value for name, value in found.items()}
    page = render(report)
    assert [words for words in said if words not in page] == []
    assert "top-1" not in page.lower().replace(HOSTILE, "")
    assert "nats" not in page
