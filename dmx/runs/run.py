"""What every run has: settings, trials, its best checkpoint. By itself, a single run."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypedDict

from dmx.errors import StageError
from dmx.runs import events, layout
from dmx.runs.files import last_line, read_config, read_json, read_scalars
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    BEST_STEP,
    DEV_ACCURACY,
    REPORT_KEYS,
    STEPS,
    TRAIN_SECONDS,
    Kind,
)
from dmx.runs.objectives import DEFAULT, evaluate
from dmx.storage.journal import read_journal

if TYPE_CHECKING:
    from dmx.runs.stages import Stage
    from dmx.runs.study import Report, Search, Takeover


TrialStatus = Literal["RUNNING", "COMPLETE", "PRUNED", "FAILED"]
UNKNOWN = "unknown"
_SAMPLE = ", not LRA"
"""How the label of data ends that stand in for the published ones (see data.manifest)."""


def number(values: Mapping[str, Any], key: str) -> float:
    """A metric as a float; NaN where it is missing or no number."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


@dataclass(kw_only=True)
class Trial:
    """One trial of a study, or the only one of a single run.

    Attributes:
        number: in the order of proposal, from 0.
        status: COMPLETE (full budget), PRUNED (stopped by the scheduler), FAILED, or RUNNING.
        drawn: the searched values by SearchSpace's labels, which tell a setting's distributions
            under several conditions apart.
        curve: step -> flat metrics.
        error: one line of what failed, or "". reason: of an early stop, in this session: the rung.
        objectives: of its study.
        changes: step -> its searched values from then on, where it took over another trial.
        started_after: how many trials had ended when it was proposed.
        folder: where it keeps its checkpoints, or None.
    """

    number: int
    status: TrialStatus = "RUNNING"
    drawn: Mapping[str, Any] = field(default_factory=dict)
    curve: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    error: str = ""
    reason: str = ""
    objectives: tuple[str, ...] = DEFAULT
    changes: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    started_after: int = 0
    folder: Path | None = None

    @property
    def values(self) -> dict[str, float]:
        """Of each objective, by name; NaN where it was not measured."""
        found = evaluate(self.objectives, self.reports)
        return dict(zip(self.objectives, found, strict=True))

    @property
    def params(self) -> dict[str, Any]:
        """The searched values by dotted RunConfig path."""
        return events.settings_of(self.drawn)

    def params_at(self, step: float) -> dict[str, Any]:
        """The searched values that its weights of a step were trained with."""
        found = self.params
        for changed, values in sorted(self.changes.items()):
            if changed < step:
                found = {**found, **values}
        return found

    @property
    def reports(self) -> tuple[Mapping[str, Any], ...]:
        """Flat metrics at each evaluation, by rising step."""
        return tuple(self.curve[step] for step in sorted(self.curve))

    @property
    def last_report(self) -> Mapping[str, Any]:
        """Flat metrics at the last evaluation; {} before the first."""
        return self.curve[max(self.curve)] if self.curve else {}

    @property
    def best(self) -> float:
        """The highest dev accuracy, or NaN."""
        return max(self.highest(DEV_ACCURACY), self.highest(BEST_DEV_ACCURACY), key=_finite_first)

    def best_within(self, steps: int) -> float:
        """The highest dev accuracy of the first so many steps, or NaN."""
        found = [number(r, DEV_ACCURACY) for r in self.reports if r[STEPS] <= steps]
        return max((v for v in found if math.isfinite(v)), default=math.nan)

    @property
    def best_step(self) -> int:
        """The step of its best checkpoint."""
        return int(self.last_report.get(BEST_STEP, 0))

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        value = self.last(STEPS)
        return int(value) if math.isfinite(value) else 0

    @property
    def seconds(self) -> float:
        """Training time, 0 before its first report."""
        return float(self.last_report.get(TRAIN_SECONDS, 0.0))

    @property
    def checkpoint(self) -> Path | None:
        """The folder of its best checkpoint, if there is one."""
        found = None if self.folder is None else self.folder / layout.BEST_DIR
        return found if found is not None and found.is_dir() else None

    def last(self, key: str) -> float:
        """A metric of the last report, or NaN."""
        return number(self.last_report, key)

    def median(self, key: str) -> float:
        """The median of a metric over all reports, or NaN; steadier than the last."""
        found = [v for r in self.reports if math.isfinite(v := number(r, key))]
        return statistics.median(found) if found else math.nan

    def highest(self, key: str) -> float:
        """The highest value of a metric over all reports, or NaN."""
        found = [v for r in self.reports if math.isfinite(v := number(r, key))]
        return max(found, default=math.nan)


def _finite_first(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


@dataclass(frozen=True, kw_only=True)
class FinalSeeds:
    """The best setting, trained again from other seeds. Accuracies lie in 0..1."""

    seeds: tuple[int, ...]
    dev_accuracies: tuple[float, ...]
    test_accuracies: tuple[float, ...]


class CheckpointMetrics(TypedDict, total=False):
    """metrics.json of a checkpoint, as far as it is read here."""

    steps: int
    best_step: int | None
    num_dev: int | None
    dev_majority: float | None
    environment: dict[str, Any] | None
    data: str
    data_checksum: str | None


class RunResult(TypedDict, total=False):
    """result.json of a single run."""

    data: str
    best_step: int | None
    test_accuracy: float | None
    test_loss: float | None


class Run:
    """A run of dmx: what its journal and the files beside it say. By itself, a single run.

    Folding an event costs no file; what lies in files is read when it is asked for, once.

    Args:
        folder: of the run; its name is the run's.

    Attributes:
        settings, options: of the latest session. train_seconds: see Curriculum.
        empty: the journal has no event.
    """

    kind: ClassVar[Kind] = "run"
    known_events: ClassVar[Mapping[str, type]] = {
        name: events.STUDY[name] for name in ("settings", "session")
    }

    # What only the other kinds have.
    search: Search | None = None
    finals: FinalSeeds | None = None
    history: Sequence[Report] = ()
    takeovers: Sequence[Takeover] = ()
    several: tuple[str, ...] = ()
    is_population: bool = False
    stages: tuple[Stage, ...] = ()
    goal: str = ""
    shown: str = ""
    recipe: str = ""
    shown_stage: Stage | None = None
    train_seconds: float = math.nan

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.empty = True
        self.settings: Mapping[str, Any] = {}
        self.options: Mapping[str, Any] = {}
        self._session: Mapping[str, Any] = {}
        self._seconds, self._begun, self._latest = math.nan, math.nan, math.nan

    # -- folding ----------------------------------------------------------------------------

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The run as its journal tells it; what lies in files is read when it is asked for.

        Raises:
            StageError: the journal is damaged; names it.
        """
        run = cls(folder)
        for event in read_journal(folder / layout.JOURNAL_FILE)[0]:
            run.add(event)
        return run

    def add(self, event: Mapping[str, Any]) -> None:
        """Take up one more event of the journal.

        Raises:
            StageError: dmx did not write it; names the journal.
        """
        self.empty = False
        try:
            self._take_up(event)
        except StageError as error:
            path = self.folder / layout.JOURNAL_FILE
            raise StageError(f"{path} is damaged: {error}") from None

    def _take_up(self, event: Mapping[str, Any]) -> None:
        name = events.check(event, self.known_events)
        time = event.get("time")
        if isinstance(time, int | float):
            if name == "session":
                self._seconds, self._begun = self._worked(), float(time)
            self._latest = float(time)
        if name == "settings":
            self.settings, self.options = event["settings"], event["options"]
            self._session = event
        if name:
            self._fold(name, event)

    def _fold(self, name: str, event: Mapping[str, Any]) -> None:
        """Take up an event of the kind's own; its fields are sound."""

    def _worked(self) -> float:
        if math.isnan(self._begun):
            return 0.0
        return (0.0 if math.isnan(self._seconds) else self._seconds) + self._latest - self._begun

    @property
    def seconds(self) -> float:
        """Wall time of all sessions, without the pauses between them; NaN for a single run."""
        return math.nan if math.isnan(self._begun) else self._worked()

    def check(self) -> None:
        """Read what lies in files, so that a damaged one is said now.

        Raises:
            DataError: one is damaged; names it.
        """
        for _ in (self.trials, self.config, self.environment, self.complete):
            pass

    # -- what it is -------------------------------------------------------------------------

    @property
    def task(self) -> str:
        """What it trains on."""
        return str((self.config or {}).get("task", UNKNOWN))

    @property
    def attention(self) -> str:
        """As the run is called, with its size where that is fixed: `butterfly-64`."""
        return str(self._session.get("attention") or UNKNOWN)

    @property
    def data(self) -> str:
        """The data's label."""
        files = ((f or {}).get("data") for f in (self._result, self._metrics, self.settings))
        return str(next((label for label in files if label), UNKNOWN))

    @property
    def is_sample(self) -> bool:
        """Whether its data stand in for the published ones."""
        return self.stands_in(self.data)

    @staticmethod
    def stands_in(data: str) -> bool:
        """Whether data with this label stand in for the published ones."""
        return data.endswith(_SAMPLE)

    @property
    def data_checksum(self) -> str:
        """Of the prepared data, or ""."""
        files = ((f or {}).get("data_checksum") for f in (self._metrics, self.settings))
        return str(next((checksum for checksum in files if checksum), ""))

    @property
    def environment(self) -> Mapping[str, Any]:
        """Versions and devices of its latest session, then of its checkpoint; `argv`."""
        argv = {k: self._session[k] for k in ("argv",) if k in self._session}
        beside = (self._metrics or {}).get("environment") or {}
        return {**self._session.get("environment", {}), **argv, **beside}

    # -- what came of it --------------------------------------------------------------------

    @functools.cached_property
    def _result(self) -> Mapping[str, Any] | None:
        return read_json(self.folder / layout.RESULT_FILE, RunResult)

    @property
    def complete(self) -> bool:
        """Whether it ran to its end."""
        return self._result is not None

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials by number; of a single run, the run itself."""
        return (self._trial,)

    @functools.cached_property
    def _trial(self) -> Trial:
        curve: dict[int, Mapping[str, Any]] = {
            step: found
            for step, found in read_scalars(self.folder).items()
            if DEV_ACCURACY in found
        }
        if not curve and self._metrics is not None and STEPS in self._metrics:
            values = {k: v for k, v in self._metrics.items() if k in REPORT_KEYS}
            curve = {self._metrics["steps"]: values}
        error = last_line(self.folder / layout.ERROR_FILE)
        ended: TrialStatus = "FAILED" if error else "RUNNING"
        status: TrialStatus = "COMPLETE" if self._result is not None else ended
        return Trial(number=0, status=status, curve=curve, error=error, folder=self.folder)

    @property
    def best_trial(self) -> Trial | None:
        """The trial with the highest dev accuracy (the earlier one on a tie), or None."""
        return best_of(self.trials)

    @property
    def best_trials(self) -> tuple[Trial, ...]:
        """The trials on the Pareto front; with one objective, the best one."""
        return () if self.best_trial is None else (self.best_trial,)

    @property
    def best(self) -> int | None:
        """The number of the best trial, or None."""
        found = self.best_trial
        return None if found is None else found.number

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, or None."""
        found = self._result or self._metrics
        return None if found is None else found.get("best_step")

    @property
    def test_accuracy(self) -> float:
        """Of the best checkpoint, in 0..1; NaN where it was not tested."""
        return number(self._result or {}, "test_accuracy")

    @property
    def test_loss(self) -> float:
        """Of the best checkpoint; NaN where it was not tested."""
        return number(self._result or {}, "test_loss")

    # -- its best checkpoint ----------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """The folder of its best checkpoint, whether there is one or not."""
        return self.folder / layout.BEST_DIR

    @functools.cached_property
    def _metrics(self) -> Mapping[str, Any] | None:
        """What was written beside the best checkpoint; before the first best one, the last."""
        found = read_json(self.checkpoint / layout.METRICS_FILE, CheckpointMetrics)
        last = self.folder / layout.LAST_DIR / layout.METRICS_FILE
        return read_json(last, CheckpointMetrics) if found is None else found

    @functools.cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The plain RunConfig of the best checkpoint, or None."""
        found = read_config(self.checkpoint) or read_config(self.folder / layout.LAST_DIR)
        return found or self.settings.get("config") or None

    @property
    def init(self) -> Mapping[str, Any]:
        """The weights that it was started from: `path`, `sha256`, `reinit`; {} for fresh ones."""
        return (self.config or {}).get("init") or {}

    @property
    def num_dev(self) -> int:
        """Examples of the dev split, 0 where unknown."""
        return (self._metrics or {}).get("num_dev") or 0

    @property
    def dev_majority(self) -> float:
        """The share of the dev split's largest class: what a model that learnt nothing reaches."""
        return number(self._metrics or {}, "dev_majority")

    # -- what follows from it ---------------------------------------------------------------

    @property
    def whole(self) -> list[Trial]:
        """The trials whose costs and accuracies compare: those that ran their full budget."""
        return [t for t in self.trials if t.status == "COMPLETE"]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages of a curriculum."""
        return sum(s.all_steps for s in self.stages)

    def count(self, status: str) -> int:
        """Trials with this status."""
        return sum(t.status == status for t in self.trials)

    def dev_error(self, accuracy: float) -> float:
        """Half of the 95 % interval of an accuracy on the dev split, in 0..1; NaN where unknown."""
        if not self.num_dev or not math.isfinite(accuracy):
            return math.nan
        return 1.96 * math.sqrt(accuracy * (1 - accuracy) / self.num_dev)

    def by_luck(self, evaluations: int) -> float:
        """The highest of so many dev accuracies that a model which learnt nothing explains.

        The best of many lies above chance by luck: the bound grows with their number (Bonferroni,
        5 % over all). NaN where the dev split is unknown.
        """
        if not (self.num_dev and evaluations and 0 < self.dev_majority < 1):
            return math.nan
        spread = math.sqrt(self.dev_majority * (1 - self.dev_majority) / self.num_dev)
        return self.dev_majority + spread * statistics.NormalDist().inv_cdf(1 - 0.05 / evaluations)

    @property
    def at_chance(self) -> bool:
        """Whether all accuracies are explained by luck; False where the dev split is unknown."""
        scores = [t.best for t in self.trials if math.isfinite(t.best)]
        bound = self.by_luck(sum(len(t.reports) for t in self.trials))
        return bool(scores) and max(scores) <= bound

    @property
    def memory_of(self) -> str:
        """What its memory is measured on: "GPU", "process", or "" where no file tells."""
        if "gpus" not in self.environment:
            return ""
        return "GPU" if self.environment["gpus"] else "process"


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """The highest dev accuracy first, the earlier one on a tie; last those that have none."""

    def order(trial: Trial) -> tuple[float, int]:
        return (-trial.best if math.isfinite(trial.best) else math.inf, trial.number)

    return sorted(trials, key=order)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the highest finite dev accuracy; the earliest on a tie; or None."""
    return next((t for t in ranked(trials) if math.isfinite(t.best)), None)
