"""How a study speaks while it runs: a live table on a terminal, plain lines, JSON lines, or not."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from dmx import log
from dmx.fitting import SETTINGS, Col, FittingTable
from dmx.runs.metrics import BEST_DEV_ACCURACY, DEV_ACCURACY, SAMPLES_PER_SECOND, STEPS, TRAIN_LOSS
from dmx.runs.study import TrialResult, best_trial
from dmx.schema import finite
from dmx.study.view import LogView
from dmx.wording import settings_text, short

Output = Literal["auto", "live", "plain", "json", "quiet"]


def write_json(**event: Any) -> None:
    """Write one JSON object as a line of standard output; NaN becomes null."""
    sys.stdout.write(json.dumps(finite(event)) + "\n")
    sys.stdout.flush()


class _View:
    """A view that needs no set-up."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to take down."""


class PlainView(_View, LogView):
    """One log line per event; what a log file should hold."""


class QuietView(_View):
    """Says nothing until the end."""

    def __enter__(self) -> Self:
        logging.getLogger("dmx").setLevel(logging.WARNING)
        return self

    def continues(self, trials: Sequence[TrialResult]) -> None:
        """Nothing."""

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Nothing."""

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def ended(self, result: TrialResult) -> None:
        """Nothing."""


class JsonView(QuietView):
    """One JSON object a line on standard output, for programs that watch a study."""

    def continues(self, trials: Sequence[TrialResult]) -> None:
        """`{"event": "continues", "trials", "ended", "best", "best_dev_accuracy"}`."""
        best = best_trial(tuple(trials))
        if trials:
            write_json(
                event="continues",
                trials=len(trials),
                ended=sum(t.status != "RUNNING" for t in trials),
                best=None if best is None else best.number,
                best_dev_accuracy=None if best is None else best.best_dev_accuracy,
            )

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """`{"event": "started", "trial", "params"}`."""
        write_json(event="started", trial=number, params=dict(point))

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """`{"event": "reported", "trial", ...metrics}`."""
        write_json(event="reported", trial=number, **metrics)

    def ended(self, result: TrialResult) -> None:
        """`{"event": "ended", "trial", "status", "best_dev_accuracy", "steps", ...}`."""
        write_json(
            event="ended",
            trial=result.number,
            status=result.status,
            best_dev_accuracy=result.best_dev_accuracy,
            steps=result.steps,
            error=result.error,
            reason=result.reason,
        )


class LiveView:
    """One table that redraws itself: running trials, the best so far, how far, how long."""

    def __init__(self, num_trials: int, max_steps: int, title: str) -> None:
        self._num_trials, self._max_steps, self._title = num_trials, max_steps, title
        self._started_at = time.monotonic()
        self._points: dict[int, Mapping[str, Any]] = {}
        self._latest: dict[int, Mapping[str, Any]] = {}
        self._ended: list[TrialResult] = []
        self._before = 0  # of them, in earlier sessions
        self._best: tuple[float, int] = (-math.inf, -1)
        self._live = Live(
            get_renderable=self.render, console=log.terminal(), refresh_per_second=2, transient=True
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def continues(self, trials: Sequence[TrialResult]) -> None:
        """What earlier sessions found counts."""
        self._ended = [t for t in trials if t.status != "RUNNING"]
        self._before = len(self._ended)
        best = best_trial(tuple(trials))
        if best is not None:
            self._best = (best.best_dev_accuracy, best.number)

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """A row appears."""
        self._points[number] = point

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """A row changes."""
        self._latest[number] = metrics
        accuracy = float(metrics[BEST_DEV_ACCURACY])
        if accuracy > self._best[0]:
            self._best = (accuracy, number)

    def ended(self, result: TrialResult) -> None:
        """A row goes; it is counted."""
        self._ended.append(result)
        self._points.pop(result.number, None)

    def render(self) -> Group:
        """What is on the screen now."""
        spare = {"samples/s": 2, "train loss": 1}
        names = ("trial", "steps", "dev acc", "best", "train loss", "samples/s")
        columns = [Col(name, right=True, spare=spare.get(name, 0)) for name in names]
        table = FittingTable(self._title, (*columns, SETTINGS))
        for number, point in sorted(self._points.items()):
            latest = self._latest.get(number, {})
            accuracy, best = latest.get(DEV_ACCURACY), latest.get(BEST_DEV_ACCURACY)
            table.add_row(
                str(number),
                f"{latest.get(STEPS, 0):,}/{self._max_steps:,}",
                "-" if accuracy is None else f"{accuracy:.4f}",
                "-" if best is None else f"{best:.4f}",
                short(latest.get(TRAIN_LOSS, "-")),
                short(latest.get(SAMPLES_PER_SECOND, "-")),
                settings_text(point),
            )
        return Group(table, Text(self.summary(time.monotonic())))

    def summary(self, now: float) -> str:
        """One line: ended trials by status, the best, and the time left if it goes on like this."""
        counts = {
            status: sum(r.status == status for r in self._ended)
            for status in ("COMPLETE", "PRUNED", "FAILED")
        }
        ended = ", ".join(f"{n} {s.lower()}" for s, n in counts.items() if n) or "none"
        best = "none" if self._best[1] < 0 else f"{self._best[0]:.4f} (trial {self._best[1]})"
        left = "?"
        here = len(self._ended) - self._before
        if here:
            seconds = now - self._started_at
            rest = seconds / here * (self._num_trials - len(self._ended))
            left = f"{rest / 60:.0f} min" if rest >= 90 else f"{rest:.0f} s"
        done = len(self._ended)
        return f"{done}/{self._num_trials} ended ({ended}); best {best}; about {left} left"


View = LiveView | PlainView | JsonView | QuietView


def choose_view(output: Output, *, num_trials: int, max_steps: int, title: str) -> View:
    """The view for `--output`; `auto` is the live table on a terminal and plain lines elsewhere."""
    if output == "auto":
        output = "live" if sys.stderr.isatty() else "plain"
    if output == "live":
        return LiveView(num_trials, max_steps, title)
    if output == "plain":
        return PlainView(num_trials)
    return JsonView() if output == "json" else QuietView()
