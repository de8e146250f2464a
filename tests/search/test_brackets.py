"""Hyperband's brackets: their shares, their rungs, and that a restart changes no decision."""

from __future__ import annotations

from collections import Counter

import pytest

from dmx.costing.asha import expected_steps
from dmx.search.brackets import bracket_of, describe_rungs, num_brackets
from dmx.study.scheduler import DurableAsha
from tests.study import test_scheduler as asha
from tests.study.test_scheduler import FACTOR, GRACE, MAX_STEPS, TRIALS, Rule


def test_how_many():
    """81 units and eta 3 give s_max = 4 in the paper."""
    assert num_brackets(grace_steps=1, max_steps=81, reduction_factor=3) == 5
    assert num_brackets(grace_steps=40, max_steps=320, reduction_factor=3) == 3
    assert num_brackets(grace_steps=7, max_steps=7, reduction_factor=3) == 1
    assert num_brackets(grace_steps=2, max_steps=20, reduction_factor=3) == 4


def test_shares_are_hyperbands():
    """ceil(5 / (s + 1) * 3^s) for s = 4, 3, 2, 1, 0: 81, 33.75, 15, 7.5 and 5."""
    assert Counter(bracket_of(n, 5, 3) for n in range(143)) == {0: 81, 1: 34, 2: 15, 3: 8, 4: 5}
    assert all(bracket_of(n, 1, 3) == 0 for n in range(5))
    assert [bracket_of(n, 3, 3) for n in range(6)] == [0, 1, 0, 2, 0, 1]


def open_hyperband(ledger) -> DurableAsha:
    rungs = {"max_steps": MAX_STEPS, "grace_steps": GRACE, "reduction_factor": FACTOR}
    return DurableAsha(ledger, **rungs, brackets=num_brackets(**rungs))


def offset_rule(bracket: int) -> Rule:
    """Rungs at 2, 6, 18 without the first `bracket` ones."""
    return Rule(rungs={GRACE * FACTOR**k: {} for k in range(bracket, 3)})


@pytest.mark.parametrize("seed", range(3))
def test_decisions_are_the_rules_of_each_bracket(tmp_path, monkeypatch, seed):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(asha, "open_asha", open_hyperband)
    reports = asha.script(seed)
    decisions, _ = asha.play(tmp_path / "s", reports, set())
    rules = [offset_rule(b) for b in range(4)]
    stopped: set[int] = set()
    for number, step, value in reports:
        if number not in stopped:
            expected = rules[bracket_of(number, 4, FACTOR)].stops(number, step, value)
            assert decisions[number, step] == expected, (number, step)
            stopped.update({number} if expected else ())
    assert stopped, "the script is one in which something is stopped"
    last = [n for n in range(TRIALS) if bracket_of(n, 4, FACTOR) == 3]
    assert last and not stopped & set(last), "the last bracket stops nobody"
    again, _ = asha.play(tmp_path / "all", reports, set(range(len(reports))))
    assert again == decisions


def test_expected_steps_lie_between_asha_and_none():
    common = {"num_trials": 27, "max_steps": 81, "grace_steps": 3, "reduction_factor": 3.0}
    common |= {"eval_every_steps": 3, "slots": 2}
    asha_steps = expected_steps(**common).expected
    hyperband = expected_steps(**common, hyperband=True).expected
    assert asha_steps < hyperband < 27 * 81


@pytest.mark.parametrize(
    ("scheduler", "grace", "steps", "factor", "said"),
    [
        ("asha", 10, 90, 3.0, "asha, rungs at 10, 30 steps, the best 1/3 go on"),
        ("asha", 90, 90, 3.0, "asha, no rung before the end, the best 1/3 go on"),
        ("hyperband", 1, 81, 3.0, "hyperband, 5 brackets with rungs from 1 steps, factor 3"),
        ("pbt", 10, 90, 3.0, "pbt, a comparison every 10 steps"),
        ("none", 10, 90, 3.0, "none, every trial runs its full budget"),
    ],
)
def test_rungs_in_words(scheduler, grace, steps, factor, said):
    found = describe_rungs(scheduler, grace_steps=grace, max_steps=steps, reduction_factor=factor)
    assert found == said
