"""Tables of the terminal are readable at any width: nothing is cut, every number is whole."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from dmx.runs.study import Study
from dmx.runs.trial import Trial
from dmx.study.views import trials_table
from dmx.terminal import Column, FittingTable

NAMES = (
    *("attention.block_size", "attention.inner", "attention.dropout", "model.dropout"),
    *("optim.learning_rate", "model.num_layers", "model.mlp_dropout", "optim.weight_decay"),
)
STUDY = Study(Path("s"))
STUDY.by_number = {
    n: Trial(
        number=n,
        status="COMPLETE" if n % 2 else "PRUNED",
        drawn={p: f"v{n}{i}" for i, p in enumerate(NAMES)},
        curve={
            62_000 + n: {
                "steps": 62_000 + n,
                "best_dev_accuracy": 0.5 + n / 100,
                "train_seconds": 8000.0 + n,
            }
        },
    )
    for n in range(5)
}


def printed(table: FittingTable, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


@pytest.mark.parametrize("width", [200, 140, 100, 80, 60])
def test_a_study_keeps_every_setting_of_every_trial(width: int) -> None:
    text = printed(trials_table(STUDY, "study: butterfly on text"), width)
    for trial in STUDY.trials:
        assert f"{trial.best:.4f}" in text and trial.status in text
        assert all(str(value) in text for value in trial.params.values())
    assert "4 *" in text
    assert all(f"{trial.seconds:.1f}" in text for trial in STUDY.trials) == (width >= 100)
    assert ("train s: see trials.csv" in text) == (width <= 80)


def test_settings_whose_names_end_alike_are_told_apart() -> None:
    wide = printed(trials_table(STUDY, "t"), 200)
    assert "attention.dropout" in wide and "model.dropout" in wide and " mlp_dropout " in wide
    row = next(line for line in wide.splitlines() if "│     2 │" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert sorted(cells[5:]) == [f"v2{i}" for i in range(len(NAMES))], "each its own value"


@pytest.mark.parametrize("text", ["[/b] unknown", "[enforce fail at alloc_cpu.cpp]", "[red]"])
def test_brackets_are_no_markup(text: str) -> None:
    """Errors of torch and paths hold them."""
    found = FittingTable(f"in {text}", (Column("error"), Column("text", fold=True)))
    found.add_row(text, text)
    shown = printed(found, 120)
    assert shown.count(text) == 3


def table(**narrow: FittingTable) -> FittingTable:
    columns = (
        Column("stage", fold=True, width=6),
        Column("dev acc", right=True),
        Column("warmup_steps", right=True, spare=1),
        Column("trained for", right=True, spare=2),
    )
    found = FittingTable("a curriculum", columns, **narrow)
    found.add_row("first_one", "0.5000", "100", "1 h 20 min")
    found.add_section()
    found.add_row("all", "0.6000", "200", "2 h 40 min")
    return found


def test_it_gets_tighter_then_loses_columns_then_folds() -> None:
    roomy, tight = printed(table(), 80), printed(table(), 44)
    assert "│ first_one │  0.5000 │          100 │  1 h 20 min │" in roomy
    assert "first_one  0.5000      100  1 h 20 min" in tight and "│" not in tight
    assert "no room" not in roomy + tight
    assert "no room for trained for" in printed(table(), 26)
    least = printed(table(), 14)
    assert "warmup_steps" in least and "first_\none" in least.replace("  0.5000", "")
    assert "0.5000" in least and "0.6000" in least


def test_the_same_told_otherwise_comes_before_columns_are_lost() -> None:
    other = FittingTable("a curriculum", (Column("all in one", fold=True),), see=": see it.csv")
    other.add_row("first_one at 0.5")
    assert "first_one at 0.5" in printed(table(narrow=other), 26)
    assert "first_one at 0.5" not in printed(table(narrow=other), 44)
