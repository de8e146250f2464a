"""Studies with several objectives, Hyperband or a warm start, in every format of the report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from dmx.errors import DataError
from dmx.reporting.leaderboard import FORMATS as LEADERBOARD
from dmx.reporting.leaderboard import gather, leaderboard_rows, leaderboards
from dmx.reporting.report import FORMATS, to_html
from dmx.reporting.tables import costed, filled_rungs
from dmx.runs.folders import load
from dmx.storage.journal import encode
from tests.reporting.makers import change_settings, make_study
from tests.tiny import one_sentence

# Accuracy 0.40 at 600 MiB, 0.20 at 599, 0.50 at 598, 0.60 at 597: memory falls with the number.
TRIALS = (
    ("COMPLETE", 32, 1e-3, {2: 0.30, 8: 0.40}),
    ("COMPLETE", 64, 5e-3, {2: 0.20}),
    ("COMPLETE", 64, 2e-3, {2: 0.45, 8: 0.60}),
    ("COMPLETE", 32, 2e-3, {2: 0.45, 8: 0.50}),
    ("FAILED", 32, 9e-3, {2: 0.99}),
)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = make_study(tmp_path / "front", TRIALS)
    return change_settings(
        folder,
        objectives=["accuracy", "memory"],
        scheduler="none",
        warm_start={"runs": ["older"], "sha256": "x"},
    )


def test_the_front_in_every_format(study):
    """Trial 2 is the most accurate, 3 the cheapest; 0 and 1 are beaten by both; 4 failed."""
    run = load(study)
    assert run.several == ("accuracy", "memory")
    pages = {name: render(run) for name, render in FORMATS.items()}
    found = json.loads(pages["json"])
    values = {"2": {"accuracy": 0.6, "memory": 598}, "3": {"accuracy": 0.5, "memory": 597}}
    assert found["front"] == values
    rows = list(csv.DictReader(io.StringIO(pages["csv"])))
    assert [r["front"] for r in rows] == ["no", "no", "yes", "yes", "no"]
    assert [float(r["objective.memory"]) for r in rows] == [600, 599, 598, 597, 596]
    table = pages["md"].split("## The Pareto front of accuracy, memory")[1].split("##")[0]
    assert "| 2 | 60.00 | 598" in table and "| 3 | 50.00 | 597" in table
    assert "| 0 |" not in table and "| 4 |" not in table
    assert "warm start from | older" in pages["md"]
    section = pages["html"].split('id="pareto"')[1].split("<section")[0]
    assert "beaten by no other: trial 2, trial 3." in section
    assert section.count('class="chart"') == 1, "accuracy against memory; time was no objective"


def test_what_was_stopped_early_is_on_no_front(tmp_path):
    """The stopped trial is the cheapest, and at 20 % far from what it would have reached."""
    trials = [("COMPLETE", 32, 1e-3, {8: 0.4}), ("PRUNED", 32, 1e-3, {2: 0.2})]
    run = load(make_study(tmp_path / "s", trials))
    assert run.trials[1].highest("peak_memory_mb") < run.trials[0].highest("peak_memory_mb")
    for key in ("step_seconds", "peak_memory_mb"):
        assert [c.trial for c in costed(run, key)] == [0]
    text = to_html(run)
    assert "On the front, beaten by no other: trial 0. Stopped early and left out: 1." in text


def test_one_objective_has_no_front(tmp_path):
    run = load(make_study(tmp_path / "s"))
    assert run.several == () and json.loads(FORMATS["json"](run))["front"] == {}
    assert "front" not in FORMATS["csv"](run).splitlines()[0]


def test_the_leaderboard_reads_them(study):
    assert "47.00" in LEADERBOARD["md"](leaderboards(leaderboard_rows(gather([study]))))


def test_unknown_objectives_are_damage(study):
    with pytest.raises(DataError, match="no sound objectives") as caught:
        load(change_settings(study, objectives=["accuracy", "beauty"]))
    one_sentence(caught.value)


def test_a_population(tmp_path):
    folder = change_settings(make_study(tmp_path / "p"), scheduler="pbt")
    exploit = {"trial": 1, "source": 2, "params": {"optim.learning_rate": 0.5}}
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(encode({"event": "compared", "step": 4, "exploits": [exploit]}))
    for name in ("md", "html"):
        page = FORMATS[name](load(folder))
        assert "The population: who took over whom" in page
        assert "The settings of a population change while it trains." in page
        assert "no result belongs to one value" in page
    assert "| 4 | 1 | 2 | learning\\_rate=0.5 |" in FORMATS["md"](load(folder))


def test_hyperbands_rungs(tmp_path):
    """8 steps, grace 2, factor 2: brackets from 2, 4 and 8 steps; 4, 3 and 3 of ten trials."""
    trials = [("COMPLETE", 32, 1e-3, {s: 0.1 * n + 0.01 * s for s in (2, 4, 8)}) for n in range(4)]
    folder = make_study(tmp_path / "h", trials, grace_steps=2, reduction_factor=2.0)
    run = load(change_settings(folder, scheduler="hyperband"))
    found = [(r.bracket, r.steps, [e.trial for e in r.entries]) for r in filled_rungs(run)]
    assert found == [(0, 2, [0, 3]), (0, 4, [0, 3]), (1, 4, [1])]
    page = FORMATS["html"](run)
    assert "Hyperband&#x27;s rungs" in page or "Hyperband's rungs" in page
    assert "## Hyperband's rungs" in FORMATS["md"](run)
