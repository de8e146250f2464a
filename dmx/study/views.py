"""What a study shows: log lines, a live table, JSON lines, TensorBoard, and the table of trials."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
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
    TEST_ACCURACY,
    TRAIN_LOSS,
    trial_folder,
)
from dmx.runs.trial import ACCURACY, OBJECTIVES, Trial, best_of, ranked
from dmx.schema import finite, flatten
from dmx.tensorboard import RunWriter
from dmx.terminal import SETTINGS, Column, FittingTable
from dmx.training.samples import write_samples

logger = logging.getLogger("dmx.study")


class StudyObserver:
    """What shows a study: terminal, TensorBoard. Called in the driver, in order.

    It shows nothing itself.
    """

    def continues(self, trials: Sequence[Trial]) -> None:
        """A session begins; these trials are known from earlier ones."""

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """A trial was launched (again, after a crash)."""

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """A trial reported; each step of a trial comes once."""

    def ended(self, result: Trial) -> None:
        """A trial ended."""


def known(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have reported an accuracy."""
    return [t for t in trials if math.isfinite(t.best)]


def standing(trials: Sequence[Trial], num_trials: int) -> str:
    """Where a study stands that is continued, in one line."""
    ended = sum(t.status != "RUNNING" for t in trials)
    best = best_of(trials)
    shown = "none" if best is None else f"{best.best:.4f} (trial {best.number})"
    return f"{ended} of {num_trials} trials have ended; best dev accuracy so far: {shown}"


class LogView(StudyObserver):
    """One log line per event."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials = num_trials
        self._best = -math.inf
        self._seen: set[int] = set()

    def continues(self, trials: Sequence[Trial]) -> None:
        """What is the best so far counts from the study's first session."""
        self._seen.update(t.number for t in trials)
        self._best = max((t.best for t in known(trials)), default=-math.inf)
        if trials:
            logger.info("%s", standing(trials, self._num_trials))

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """A trial was launched."""
        values = settings_text(point)
        how = "goes on" if number in self._seen else "starts"
        self._seen.add(number)
        logger.info("trial %d %s: %s", number, how, values)

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """A trial reported."""
        accuracy = metrics[DEV_ACCURACY]
        mark = ""
        if accuracy > self._best:
            self._best, mark = accuracy, "  <- best so far"
        logger.info(
            "trial %d step %d: dev accuracy %.4f, train loss %.4f%s",
            number,
            metrics[STEPS],
            accuracy,
            metrics[TRAIN_LOSS],
            mark,
        )

    def ended(self, result: Trial) -> None:
        """A trial ended."""
        early = f"was stopped early{f' at {result.reason}' if result.reason else ''}"
        what = {"COMPLETE": "ran its full budget", "PRUNED": early}
        reason = what.get(result.status, f"failed: {result.error}")
        logger.info(
            "trial %d %s (best dev accuracy %s, %d steps)",
            result.number,
            reason,
            f"{result.best:.4f}" if math.isfinite(result.best) else "none",
            result.steps,
        )


class TensorBoardView(StudyObserver):
    """Scalars and HParams of each trial, in the trial's folder."""

    def __init__(
        self, folder: Path, constants: Mapping[str, Any], searched: tuple[str, ...]
    ) -> None:
        self._folder, self._constants, self._searched = folder, constants, searched
        self._writers: dict[int, RunWriter] = {}
        self._values: dict[int, dict[str, Any]] = {}
        self._steps: dict[int, int] = {}

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

    def test(self, number: int, accuracy: float, step: int) -> None:
        """The test accuracy of the best trial."""
        writer = RunWriter(trial_folder(self._folder, number))
        writer.scalars({TEST_ACCURACY: accuracy}, step)
        writer.close()

    def close(self) -> None:
        """Close what interrupted trials left open."""
        for writer in self._writers.values():
            writer.close()


def _known(value: float | None) -> Any:
    return "-" if value is None or math.isnan(value) else value


def trials_table(
    trials: tuple[Trial, ...],
    title: str,
    best: int | None,
    objectives: tuple[str, ...] = (),
    front: tuple[int, ...] = (),
) -> FittingTable:
    """The table of trials, best first; parameters that never varied are left out.

    Args:
        trials: of a population, with the values that each ended with.
        objectives: of a study with several; each but accuracy has a column.
        front: the trials that are marked with a +.
    """
    points = {t.number: t.params_at(math.inf) for t in trials}
    params = sorted({key for point in points.values() for key in point})
    varied = [p for p in params if len({repr(v.get(p)) for v in points.values()}) > 1] or params
    costs = [name for name in objectives if name != ACCURACY]
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

    for trial in ranked(trials):
        accuracy = trial.best
        point = points[trial.number]
        style = "bold" if trial.number == best else "green" if trial.number in front else None
        cells = (
            f"{trial.number}{' +' * (trial.number in front)}{' *' * (trial.number == best)}",
            trial.status if not trial.error else f"FAILED: {trial.error[:40]}",
            f"{accuracy:.4f}" if math.isfinite(accuracy) else "-",
            str(trial.steps),
            f"{trial.seconds:.1f}",
            *(short(_known(trial.values.get(name))) for name in costs),
        )
        table.add_row(*cells, *(short(point.get(name, "-")) for name in varied), style=style)
        narrow.add_row(
            *cells, settings_text({p: point[p] for p in varied if p in point}), style=style
        )
    return table


Output = Literal["auto", "live", "plain", "json", "quiet"]


def write_json(**event: Any) -> None:
    """Write one JSON object as a line of standard output; NaN becomes null."""
    sys.stdout.write(json.dumps(finite(event)) + "\n")
    sys.stdout.flush()


class _View:
    """A view that needs no set-up."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to take down."""


class PlainView(_View, LogView):
    """One log line per event; what a log file should hold."""


class QuietView(_View, StudyObserver):
    """Says nothing until the end."""

    def __enter__(self) -> Self:
        logging.getLogger("dmx").setLevel(logging.WARNING)
        return self


class JsonView(QuietView):
    """One JSON object a line on standard output, for programs that watch a study."""

    def continues(self, trials: Sequence[Trial]) -> None:
        """`{"event": "continues", "trials", "ended", "best", "best_dev_accuracy"}`."""
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
        """`{"event": "started", "trial", "params"}`."""
        write_json(event="started", trial=number, params=dict(point))

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """`{"event": "reported", "trial", ...metrics}`."""
        write_json(event="reported", trial=number, **metrics)

    def ended(self, result: Trial) -> None:
        """`{"event": "ended", "trial", "status", "best_dev_accuracy", "steps", ...}`."""
        write_json(
            event="ended",
            trial=result.number,
            status=result.status,
            best_dev_accuracy=result.best,
            steps=result.steps,
            error=result.error,
            reason=result.reason,
        )


class LiveView(StudyObserver):
    """One table that redraws itself: running trials, the best so far, how far, how long."""

    def __init__(self, num_trials: int, max_steps: int, title: str) -> None:
        self._num_trials, self._max_steps, self._title = num_trials, max_steps, title
        self._started_at = time.monotonic()
        self._points: dict[int, Mapping[str, Any]] = {}
        self._latest: dict[int, Mapping[str, Any]] = {}
        self._ended: list[Trial] = []
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
        """What earlier sessions found counts."""
        self._ended = [t for t in trials if t.status != "RUNNING"]
        self._before = len(self._ended)
        best = best_of(trials)
        if best is not None:
            self._best = (best.best, best.number)

    def started(self, number: int, point: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """A row appears."""
        self._points[number] = point

    def reported(self, number: int, metrics: Mapping[str, Any]) -> None:
        """A row changes."""
        self._latest[number] = metrics
        accuracy = float(metrics[BEST_DEV_ACCURACY])
        if accuracy > self._best[0]:
            self._best = (accuracy, number)

    def ended(self, result: Trial) -> None:
        """A row goes; it is counted."""
        self._ended.append(result)
        self._points.pop(result.number, None)

    def render(self) -> Group:
        """What is on the screen now."""
        spare = {"samples/s": 2, "train loss": 1}
        names = ("trial", "steps", "dev acc", "best", "train loss", "samples/s")
        columns = [Column(name, right=True, spare=spare.get(name, 0)) for name in names]
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
