"""Figures of merit: Pareto fronts, importances, published numbers, texts of numbers."""

from __future__ import annotations

import importlib.util
import math
import random
import re
import shlex
from pathlib import Path

import pytest

from dmx.format import duration, mean_and_deviation, scaled, short, with_spread
from dmx.reporting import importance
from dmx.reporting.importance import importances
from dmx.reporting.published import column_of, load_published
from dmx.reporting.report import train_command
from dmx.reporting.tables import Costed, front
from dmx.runs.folders import load
from tests.reporting.makers import TRIALS, make_run, make_study


@pytest.mark.parametrize("seed", range(10))
def test_front_is_what_nothing_beats(seed: int) -> None:
    draw = random.Random(seed)
    points = [Costed(i, draw.randrange(6), draw.randrange(6)) for i in range(15)]

    def beaten(p: Costed) -> bool:
        return any(
            q.cost <= p.cost
            and q.accuracy >= p.accuracy
            and (q.cost, q.accuracy, -q.trial) != (p.cost, p.accuracy, -p.trial)
            and ((q.cost, q.accuracy) != (p.cost, p.accuracy) or q.trial < p.trial)
            for q in points
        )

    expected = sorted((p for p in points if not beaten(p)), key=lambda p: p.cost)
    assert front(points) == expected
    assert front([]) == []


def _trials(count: int, accuracy) -> list:
    draw = random.Random(0)
    found = []
    for _ in range(count):
        size, rate = draw.choice([32, 64]), 10 ** draw.uniform(-4, -2)
        found.append(("COMPLETE", size, rate, {2: accuracy(size, rate)}))
    return found


@pytest.mark.parametrize("has_sklearn", [True, False])
def test_the_value_that_decides_is_the_important_one(tmp_path, monkeypatch, has_sklearn) -> None:
    if has_sklearn and importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed")
    if not has_sklearn:
        monkeypatch.setattr(importance.importlib.util, "find_spec", lambda name: None)
    trials = _trials(40, lambda size, rate: 0.5 + 0.1 * math.log10(rate))
    found = importances(load(make_study(tmp_path / "s", trials)))
    assert found.method == ("fANOVA" if has_sklearn else "PED-ANOVA")
    assert next(iter(found.values)) == "optim.learning_rate"
    assert math.fsum(found.values.values()) == pytest.approx(1.0)
    assert found.values["optim.learning_rate"] > 0.8 and found.num_trials == 40


def test_the_range_counts_on_the_scale_on_which_it_is_drawn(tmp_path) -> None:
    """0.10 * log10(rate / 1e-4) over [0, 2] has variance 0.01 * 4 / 12; a step of 0.1 between two
    sizes 0.1^2 / 4: shares of 57 and 43 %. On a linear scale the rate would have 0.01 * 0.176.
    """
    pytest.importorskip("sklearn")
    trials = _trials(80, lambda size, rate: 0.1 * (math.log10(rate) + 4) + 0.1 * (size == 64))
    found = importances(load(make_study(tmp_path / "s", trials)))
    assert found.method == "fANOVA" and "each setting explains" in found.meaning
    assert found.values["optim.learning_rate"] == pytest.approx(0.57, abs=0.08)


def test_trials_compare_within_the_steps_that_all_took(tmp_path) -> None:
    """Large blocks learn more slowly and end where small ones do; the rate alone matters at 2."""
    curves = _trials(40, lambda size, rate: 0.5 + 0.1 * math.log10(rate))
    trials = []
    for n, (_, size, rate, curve) in enumerate(curves):
        late = {} if n % 2 and size == 64 else {8: 0.9}
        trials.append(("COMPLETE" if late else "PRUNED", size, rate, {**curve, **late}))
    found = importances(load(make_study(tmp_path / "s", trials)))
    assert found.values["optim.learning_rate"] > 0.8 and found.num_trials == 40
    assert "within 2 steps, which all of them took" in found.note


def test_no_importances_where_nothing_can_be_said(tmp_path) -> None:
    few = importances(load(make_study(tmp_path / "few")))
    assert not few.values and few.note.startswith("3 scored trials are too few")
    same = importances(load(make_study(tmp_path / "same", _trials(6, lambda s, r: 0.5))))
    assert not same.values and "same accuracy" in same.note
    assert not importances(load(make_run(tmp_path / "r"))).values


def test_a_conditional_value_is_named_and_not_ranked(tmp_path) -> None:
    import json

    folder = make_study(tmp_path / "s", _trials(8, lambda size, rate: rate))
    run = load(folder)
    for trial in run.trials:
        if trial.number <= 2:
            trial.drawn = {"attention.block_size": trial.drawn["attention.block_size"]}
    found = importances(run)
    assert found.left_out == {"optim.learning_rate": 5}
    assert set(found.values) <= {"attention.block_size"}
    assert json.dumps(found.left_out)


# Typed off numbers.md by hand: (source, model, column, per cent).
PUBLISHED = [
    ("lra", "Transformer", "listops", 36.37),
    ("lra", "Performer", "pathfinder", 77.05),
    ("lra", "Linformer", "listops", 35.70),
    ("lra", "Longformer", "text", 62.85),
    ("nystromformer", "Nystromformer", "retrieval", 79.56),
    ("nystromformer", "Standard", "image", 38.20),
    ("flashattention", "FlashAttention", "pathx", 61.4),
    ("flashattention", "Reformer", "text", 63.8),
    ("records", "Mega", "image", 90.44),
    ("records", "ChordMixer", "pathx", 98.63),
    ("records", "S4-LegS (v2)", "pathx", 96.35),
]


@pytest.mark.parametrize(("source", "model", "column", "value"), PUBLISHED)
def test_published_number(source: str, model: str, column: str, value: float) -> None:
    (row,) = [r for r in load_published().rows if (r.source, r.model) == (source, model)]
    assert row.accuracies[column] == value


def test_every_published_row_stands_in_the_notes() -> None:
    notes = Path(__file__).resolve().parents[3] / "shared" / "numbers.md"
    if not notes.is_file():
        pytest.skip("../shared/numbers.md is not part of the repository")
    rows = []
    for line in notes.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            rows.append([float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", line)])
    order = ("listops", "text", "retrieval", "image", "pathfinder")
    for row in load_published().rows:
        values = [row.accuracies[c] for c in order if c in row.accuracies]
        values += [v for v in [row.accuracies.get("pathx")] if v is not None]
        assert any(all(v in numbers for v in values) for numbers in rows), row.model


def test_published_rows_are_well_formed() -> None:
    table = load_published()
    assert len(table.rows) >= 40
    for row in table.rows:
        assert row.accuracies and all(10 < v < 100 for v in row.accuracies.values())
        assert not set(row.chance) & set(row.accuracies)
    assert all(s.url.startswith("https://") for s in table.sources.values())
    assert column_of("pathfinder32-curv_contour_length_14") == "pathfinder"
    assert column_of("pathfinder32-curv_baseline") is None
    assert "pathx" in {c for r in table.of("pathx") for c in r.chance}


def test_command_gives_the_same_run_again(tmp_path) -> None:
    """Read the command back as dmx.train would, and compare every setting."""
    from dmx.config import parse_run_config
    from dmx.schema import flatten, parse_assignments, to_dict

    values = {
        "attention.inner": {"name": "nystrom", "num_landmarks": 8},
        "attention.dropout": 0.25,
        "optim.learning_rate": 3e-4,
        "optim.warmup_steps": 5,
        "train.num_steps": 40,
        "train.clip_gradient_norm": 1.0,
    }
    folder = make_run(tmp_path / "it's", **{k.replace(".", "__"): v for k, v in values.items()})
    run = load(folder)
    words = shlex.split(train_command(run))
    assert words[:3] == ["python", "-m", "dmx.train"] and words[8] == "it's-again"
    assert words[3:7] == ["--attention", "butterfly-64", "--task", "text"]
    again = parse_run_config(
        {"attention": words[4], "task": words[6]}, flatten(parse_assignments(words[9:]))
    )
    assert run.config is not None
    assert flatten(to_dict(again)) == flatten(run.config)
    assert not any("embedding_dim" in w for w in words), "defaults are not repeated"


def test_texts_of_numbers() -> None:
    assert [duration(s) for s in (0.21, 41, 245, 11520, 3e6)] == [
        "210 ms",
        "41 s",
        "4 min 5 s",
        "3 h 12 min",
        "34.7 days",
    ]
    assert duration(59.99) == "60 s" and duration(3599.9) == "1 h 0 min"
    assert scaled(1234567) == "1.23 M" and scaled(2**30, "B", 1024) == "1 GiB"
    assert scaled(math.nan) == "–" and short(True) == "yes" and short(4.58e-4) == "4.58e-4"
    assert mean_and_deviation((0.1, 0.3)) == (pytest.approx(0.2), pytest.approx(0.1414, abs=1e-4))
    assert with_spread((0.5,)) == "50.00" and with_spread((0.1, 0.3)) == "20.00 ± 14.14"
    assert TRIALS[0][0] == "COMPLETE"
