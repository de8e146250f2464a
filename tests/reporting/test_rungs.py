"""The rungs' plot, and the best accuracy so far."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from dmx.reporting.figures import rung_plot
from dmx.reporting.tables import best_so_far
from dmx.runs.folders import load
from dmx.search.rungs import Rung, RungEntry
from tests.reporting.makers import make_study


def test_no_trials_number_covers_another(tmp_path: Path) -> None:
    """Twenty trials of nearly one accuracy: each has its point, and few their numbers."""
    close = [RungEntry(n, 0.5 + n / 10_000, n % 3 == 0) for n in range(20)]
    apart = [RungEntry(n, n / 4, True) for n in range(4)]
    run = load(make_study(tmp_path / "s"))
    figure = rung_plot(run, [Rung(2, close), Rung(6, apart)])
    assert figure is not None
    drawn = str(figure.svg)
    number = r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>#(\d+)<'
    found = [(float(x), float(y), int(n)) for x, y, n in re.findall(number, drawn)]
    assert drawn.count("<title>trial ") == 24
    assert 2 <= len(found) - 4 < 20 and {n for _, _, n in found[-4:]} == {0, 1, 2, 3}
    for (x, y, _), (u, v, _) in itertools.combinations(found, 2):
        assert abs(x - u) >= 22 or abs(y - v) >= 11


def test_best_so_far_counts_each_trials_steps_once() -> None:
    history = [(0, 2, 0.3), (1, 2, 0.2), (0, 4, 0.4), (1, 4, float("nan")), (2, 6, 0.5)]
    assert best_so_far(history) == [(2, 0.3), (4, 0.3), (6, 0.4), (8, 0.4), (14, 0.5)]


def test_repeated_reports_cost_nothing() -> None:
    assert best_so_far([(0, 4, 0.3), (0, 4, 0.3), (0, 2, 0.1)]) == [(4, 0.3)] * 3
