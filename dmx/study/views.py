"""What a study shows: log lines, a live table, JSON lines, TensorBoard, and the table of trials."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from dmx import terminal
from dmx.format import settings_text, short, short_names
from dmx.runs import layout
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    BEST_STEP,
    DEV_ACCURACY,
    SAMPLES_PER_SECOND,
    STEPS,
    TRAIN_LOSS,
    trial_folder,
)
from dmx.runs.study import Study
from dmx.runs.trial import ACCURACY, OBJECTIVES, Trial, best_of, ranked
from dmx.schema import flatten, to_dict
from dmx.tensorboard import RunWriter
from dmx.terminal import SETTINGS, Column, FittingTable
from dmx.training.samples import write_samples

logger = logging.getLogger("dmx.study")


class StudyObserver:
    """What shows a study: terminal, TensorBoard. Called in the driver, in order.

    It shows nothing itself.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def continues(self, trials: Sequence[Trial]) -> None:
        """A session begins; these trials are known from earlier ones."""

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """A trial was launched (again, after a crash)."""

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """A trial reported; each step of a trial comes once."""

    def ended(self, result: Trial) -> None:
        """A trial ended."""


class LogView(StudyObserver):
    """One log line per event; what a log file should hold."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials = num_trials
        self._best = -math.inf
        self._seen: set[int] = set()

    def continues(self, trials: Sequence[Trial]) -> None:
        """What is the best so far counts from the study's first session."""
        self._seen.update(t.number for t in trials)
        best, shown = best_of(trials), "none"
        if best is not None:
            self._best, shown = best.best, f"{best.best:.4f} (trial {best.number})"
        if trials:
            logger.info(
                "%d of %d trials have ended; best dev accuracy so far: %s",
                sum(t.status != "RUNNING" for t in trials),
                *(self._num_trials, shown),
            )

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        how = "goes on" if number in self._seen else "starts"
        self._seen.add(number)
        logger.info("trial %d %s: %s", number, how, settings_text(point))

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        accuracy, mark = metrics[DEV_ACCURACY], ""
        if accuracy > self._best:
            self._best, mark = accuracy, "  <- best so far"
        logger.info(
            "trial %d step %d: dev accuracy %.4f, train loss %.4f%s",
            *(number, metrics[STEPS], accuracy, metrics[TRAIN_LOSS], mark),
        )

    def ended(self, result: Trial) -> None:
        early = f"was stopped early{f' at {result.reason}' if result.reason else ''}"
        what = {"COMPLETE": "ran its full budget", "PRUNED": early}
        logger.info(
            "trial %d %s (best dev accuracy %s, %d steps)",
            result.number,
            what.get(result.status, f"failed: {result.error}"),
            f"{result.best:.4f}" if math.isfinite(result.best) else "none",
            result.steps,
        )


class QuietView(StudyObserver):
    """Says nothing until the end."""

    def __enter__(self) -> Self:
        logging.getLogger("dmx").setLevel(logging.WARNING)
        return self


class JsonView(QuietView):
    """One JSON object a line on standard output, for programs that watch a study.

    `continues`: trials, ended, best, best_dev_accuracy. `started`: trial, params. `reported`:
    trial and its metrics. `ended`: trial, status, best_dev_accuracy, steps, error, reason.
    """

    def continues(self, trials: Sequence[Trial]) -> None:
        best = best_of(trials)
        if trials:
            write_json(
                event="continues",
                trials=len(trials),
                ended=sum(t.status != "RUNNING" for t in trials),
                best=None if best is None else best.number,
                best_dev_accuracy=None if best is None else best.best,
            )

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        write_json(event="started", trial=number, params=dict(point))

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        write_json(event="reported", trial=number, **metrics)

    def ended(self, result: Trial) -> None:
        names = ("status", "steps", "error", "reason")
        found = {name: getattr(result, name) for name in names}
        write_json(event="ended", trial=result.number, best_dev_accuracy=result.best, **found)


def write_json(**event: Any) -> None:
    """Write one JSON object as a line of standard output; NaN becomes null."""
    sys.stdout.write(json.dumps(to_dict(event, finite=True)) + "\n")
    sys.stdout.flush()


class LiveView(StudyObserver):
    """One table that redraws itself: running trials, the best so far, how far, how long."""

    def __init__(self, num_trials: int, max_steps: int, title: str) -> None:
        self._num_trials, self._max_steps, self._title = num_trials, max_steps, title
        self._started_at = time.monotonic()
        self._points: dict[int, Mapping[str, Any]] = {}
        self._latest: dict[int, Mapping[str, Any]] = {}
        self._ended: Counter[str] = Counter()
        self._before = 0  # of them, in earlier sessions
        self._best: tuple[float, int] = (-math.inf, -1)
        self._live = Live(
            get_renderable=self.render,
            console=terminal.shared_console(),
            refresh_per_second=2,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def continues(self, trials: Sequence[Trial]) -> None:
        self._ended = Counter(t.status for t in trials if t.status != "RUNNING")
        self._before = self._ended.total()
        if (best := best_of(trials)) is not None:
            self._best = (best.best, best.number)

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._points[number] = point

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        self._latest[number] = metrics
        accuracy = float(metrics[BEST_DEV_ACCURACY])
        if accuracy > self._best[0]:
            self._best = (accuracy, number)

    def ended(self, result: Trial) -> None:
        self._ended[result.status] += 1
        self._points.pop(result.number, None)

    def render(self) -> Group:
        """What is on the screen now."""
        spare = {"samples/s": 2, "train loss": 1}
        names = ("trial", "steps", "dev acc", "best", "train loss", "samples/s")
        columns = [Column(name, right=True, spare=spare.get(name, 0)) for name in names]
        table = FittingTable(self._title, (*columns, SETTINGS))
        for number, point in sorted(self._points.items()):
            latest = self._latest.get(number, {})
            accuracies = (latest.get(key) for key in (DEV_ACCURACY, BEST_DEV_ACCURACY))
            table.add_row(
                str(number),
                f"{latest.get(STEPS, 0):,}/{self._max_steps:,}",
                *("-" if value is None else f"{value:.4f}" for value in accuracies),
                *(short(latest.get(key, "-")) for key in (TRAIN_LOSS, SAMPLES_PER_SECOND)),
                settings_text(point),
            )
        return Group(table, Text(self.summary(time.monotonic())))

    def summary(self, now: float) -> str:
        """One line: ended trials by status, the best, and the time left if it goes on like this."""
        done, statuses = self._ended.total(), ("COMPLETE", "PRUNED", "FAILED")
        ended = ", ".join(f"{self._ended[s]} {s.lower()}" for s in statuses if self._ended[s])
        best = "none" if self._best[1] < 0 else f"{self._best[0]:.4f} (trial {self._best[1]})"
        left = "?"
        if here := done - self._before:
            rest = (now - self._started_at) / here * (self._num_trials - done)
            left = f"{rest / 60:.0f} min" if rest >= 90 else f"{rest:.0f} s"
        return (
            f"{done}/{self._num_trials} ended ({ended or 'none'}); best {best}; about {left} left"
        )


Output = Literal["auto", "live", "plain", "json", "quiet"]


def choose_view(output: Output, *, num_trials: int, max_steps: int, title: str) -> StudyObserver:
    """The view for `--output`; `auto` is the live table on a terminal and plain lines elsewhere."""
    if output == "auto":
        output = "live" if sys.stderr.isatty() else "plain"
    if output == "live":
        return LiveView(num_trials, max_steps, title)
    if output == "plain":
        return LogView(num_trials)
    return JsonView() if output == "json" else QuietView()


class TensorBoardView(StudyObserver):
    """Scalars and HParams of each trial, in the trial's folder.

    Args:
        folder: of the study. constants: in each trial's row. searched: settings with a column.
    """

    def __init__(
        self, folder: Path, constants: Mapping[str, Any], searched: tuple[str, ...]
    ) -> None:
        self._folder, self._constants, self._searched = folder, constants, searched
        self._writers: dict[int, RunWriter] = {}
        self._values: dict[int, dict[str, Any]] = {}
        self._steps: dict[int, int] = {}

    def __exit__(self, *error: object) -> None:
        self.close()

    def _writer(self, number: int) -> RunWriter:
        if number not in self._writers:
            self._writers[number] = RunWriter(trial_folder(self._folder, number))
        return self._writers[number]

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """The row appears in HParams at once, with a cell for each of its searched values."""
        # The config says it for this moment; a population's trials change their values.
        flat = {**point, **flatten(config)}
        values = {k: flat[k] for k in self._searched if k in flat}
        group = f"{self._folder.name}/{number:04d}"
        if number not in self._values:  # HParams keeps what it hears first
            self._writer(number).start({**values, **self._constants}, group)
        elif self._values[number] != values:
            rows = "\n".join(f"| {k} | {v} |" for k, v in values.items())
            text = f"From here on:\n\n| setting | value |\n|---|---|\n{rows}"
            self._writer(number).text("settings", text, self._steps.get(number, 0))
        self._values[number] = values

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """Scalars against optimizer steps; at a new best, what that model says of some samples."""
        step = self._steps[number] = int(metrics[STEPS])
        self._writer(number).scalars(metrics, step)
        if metrics.get(BEST_STEP) == step:
            best = trial_folder(self._folder, number) / layout.BEST_DIR
            write_samples(self._writer(number), best, step)

    def ended(self, result: Trial) -> None:
        """The status appears in HParams."""
        self._writer(result.number).end(result.status)
        del self._writers[result.number]

    def close(self) -> None:
        """Close what interrupted trials left open."""
        for writer in self._writers.values():
            writer.close()


def trials_table(study: Study, title: str) -> FittingTable:
    """The table of trials, best first; parameters that never varied are left out.

    A population's have the values that they ended with. The best has a *, those on the front a +.
    """
    trials, best = ranked(study.trials), study.best
    front = {t.number for t in study.best_trials} if study.several else set()
    points = {t.number: t.params_at(math.inf) for t in trials}
    params = sorted({key for point in points.values() for key in point})
    varied = [p for p in params if len({repr(v.get(p)) for v in points.values()}) > 1] or params
    costs = [name for name in study.several if name != ACCURACY]
    shared = (
        Column("trial", right=True),
        Column("status", fold=True),
        Column("best dev acc", right=True),
        Column("steps", right=True, spare=1),
        Column("train s", right=True, spare=2),
        *(Column(OBJECTIVES[name].label, right=True) for name in costs),
    )
    see = f": see {layout.TRIALS_FILE}"
    narrow = FittingTable(title, (*shared, SETTINGS), see=see)
    own = (Column(name, right=True) for name in short_names(varied))
    table = FittingTable(title, (*shared, *own), narrow=narrow)
    for trial in trials:
        number, point = trial.number, points[trial.number]
        measured = (trial.values.get(name, math.nan) for name in costs)
        cells = (
            f"{number}{' +' * (number in front)}{' *' * (number == best)}",
            trial.status if not trial.error else f"FAILED: {trial.error[:40]}",
            f"{trial.best:.4f}" if math.isfinite(trial.best) else "-",
            str(trial.steps),
            f"{trial.seconds:.1f}",
            *("-" if math.isnan(value) else short(value) for value in measured),
        )
        style = "bold" if number == best else "green" if number in front else None
        table.add_row(*cells, *(short(point.get(name, "-")) for name in varied), style=style)
        settings = settings_text({p: point[p] for p in varied if p in point})
        narrow.add_row(*cells, settings, style=style)
    return table
