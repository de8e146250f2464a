"""What a report knows of a run: typed, frozen, independent of how it is shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmx.runs.layout import Kind
from dmx.runs.metrics import BEST_DEV_ACCURACY, DEV_ACCURACY, STEPS
from dmx.runs.objectives import DEFAULT
from dmx.runs.study import TrialStatus


def number(values: Mapping[str, Any], key: str) -> float:
    """A metric as a float; NaN where it is missing or no number."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a study, or the only one of a single run, with all that it reported.

    Attributes:
        params: the searched values. drawn: the same by Optuna's names, which tell a setting's
            distributions under several conditions apart.
        reports: flat metrics at each evaluation, by rising step.
        error: one line of what failed, or "".
    """

    number: int
    status: TrialStatus
    params: Mapping[str, Any] = field(default_factory=dict)
    drawn: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[Mapping[str, Any], ...] = ()
    error: str = ""

    @property
    def best(self) -> float:
        """The highest dev accuracy, or NaN."""
        found = [number(r, DEV_ACCURACY) for r in self.reports]
        found += [number(r, BEST_DEV_ACCURACY) for r in self.reports]
        return max((v for v in found if math.isfinite(v)), default=math.nan)

    def best_within(self, steps: int) -> float:
        """The highest dev accuracy of the first so many steps, or NaN."""
        found = [number(r, DEV_ACCURACY) for r in self.reports if r[STEPS] <= steps]
        return max((v for v in found if math.isfinite(v)), default=math.nan)

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        value = self.last(STEPS)
        return int(value) if math.isfinite(value) else 0

    def last(self, key: str) -> float:
        """A metric of the last report, or NaN."""
        return number(self.reports[-1], key) if self.reports else math.nan

    def median(self, key: str) -> float:
        """The median of a metric over all reports, or NaN; steadier than the last."""
        found = sorted(v for r in self.reports if math.isfinite(v := number(r, key)))
        if not found:
            return math.nan
        middle = len(found) // 2
        return found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) / 2

    def highest(self, key: str) -> float:
        """The highest value of a metric over all reports, or NaN."""
        found = [v for r in self.reports if math.isfinite(v := number(r, key))]
        return max(found, default=math.nan)


@dataclass(frozen=True, kw_only=True)
class FinalSeeds:
    """The best setting, trained again from other seeds. Accuracies lie in 0..1."""

    seeds: tuple[int, ...]
    dev_accuracies: tuple[float, ...]
    test_accuracies: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a study searched.

    Attributes:
        searched: Optuna's name -> (kind, *values), as in the search space.
        grace_steps, reduction_factor: of ASHA.
        objectives: names, see dmx.runs.objectives.
        warm_start: the earlier studies it learnt from.
        derived: they stand in no file and were worked out from the study's other settings.
    """

    searched: Mapping[str, tuple[Any, ...]]
    scheduler: str
    sampler: str
    seed: int | None
    max_steps: int
    num_trials: int
    grace_steps: int
    reduction_factor: float
    derived: bool
    objectives: tuple[str, ...] = DEFAULT
    warm_start: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageSearch:
    """What a stage that is a search found: its best trial, and that trial's values."""

    trial: int
    num_trials: int
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a curriculum's stage; `passed` is None while its gate has not decided.

    Attributes:
        reports: of a search, those of its best trial. steps: likewise.
        all_steps, seconds: optimizer steps and training time, of a search those of all its trials.
    """

    number: int
    reports: tuple[Mapping[str, Any], ...] = ()
    passed: bool | None = None
    reason: str = ""
    steps: int = 0
    all_steps: int = 0
    seconds: float = math.nan
    search: StageSearch | None = None

    @property
    def best(self) -> float:
        """The highest dev accuracy, or NaN."""
        return Trial(number=0, status="RUNNING", reports=self.reports).best


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a curriculum. Accuracies lie in 0..1, NaN where unknown.

    Attributes:
        attention: with its size; of a search, its best trial's.
        parent: the stage it started from, or where else its weights came from, or None.
        steps: of the promoted attempt, else of the latest. all_steps, seconds: of all attempts.
        test_on_last: accuracy on the test split of the curriculum's last stage.
        checkpoint: of the promoted attempt. start: that which this one's training started from.
        data_root: the folder of all data. reinit: weights that started afresh.
        promoted: the attempt whose checkpoint the next stage gets, or None.
    """

    name: str
    task: str
    attention: str = ""
    data: str = ""
    data_checksum: str = ""
    status: str = ""
    parent: str | None = None
    steps: int = 0
    all_steps: int = 0
    seconds: float = 0.0
    dev_accuracy: float = math.nan
    test_accuracy: float = math.nan
    test_on_last: float = math.nan
    checkpoint: str = ""
    start: str = ""
    data_root: str = ""
    reinit: tuple[str, ...] = ()
    promoted: int | None = None
    attempts: tuple[Attempt, ...] = ()
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything a report shows.

    Attributes:
        attention: as the run is called, with its size where that is fixed (`butterfly-64`).
        data: the data's label. is_sample: it stands in for the published data.
        config: the plain RunConfig of the best checkpoint (of the last stage), or None.
        best: number of the best trial, or None.
        test_accuracy, test_loss: of the best checkpoint; NaN where it was not tested.
        num_dev: examples of the dev split, 0 where unknown. dev_majority: the share of its largest
            class: what a model that learnt nothing reaches; NaN where unknown.
        options: of its command, as its record has them.
        seconds: wall time of the whole run, without the pauses between its sessions, or NaN.
        train_seconds: of all that was trained, side by side or not, or NaN.
        goal: a curriculum's last stage. shown: the last one on the way to it that was begun: task,
            data, config and accuracies are its.
        recipe: of a curriculum, equal where all but the seeds is.
    """

    kind: Kind
    name: str
    folder: Path
    task: str
    attention: str
    data: str
    is_sample: bool
    data_checksum: str = ""
    complete: bool = False
    config: Mapping[str, Any] | None = None
    trials: tuple[Trial, ...] = ()
    best: int | None = None
    best_step: int | None = None
    test_accuracy: float = math.nan
    test_loss: float = math.nan
    finals: FinalSeeds | None = None
    search: Search | None = None
    stages: tuple[Stage, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = math.nan
    train_seconds: float = math.nan
    goal: str = ""
    shown: str = ""
    recipe: str = ""
    num_dev: int = 0
    dev_majority: float = math.nan

    @property
    def best_trial(self) -> Trial | None:
        """The best trial, or None."""
        return next((t for t in self.trials if t.number == self.best), None)

    @property
    def several(self) -> tuple[str, ...]:
        """The objectives of a search for a Pareto front; () for any other run."""
        objectives = self.search.objectives if self.search is not None else ()
        return objectives if len(objectives) > 1 else ()

    @property
    def is_population(self) -> bool:
        """Whether its trials took over each other's weights (--scheduler pbt)."""
        return self.search is not None and self.search.scheduler == "pbt"

    @property
    def init(self) -> Mapping[str, Any]:
        """The weights that it was started from: `path`, `sha256`, `reinit`; {} for fresh ones."""
        return (self.config or {}).get("init") or {}

    @property
    def whole(self) -> list[Trial]:
        """The trials whose costs and accuracies compare: those that ran their full budget."""
        return [t for t in self.trials if t.status == "COMPLETE"]

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

    @property
    def shown_stage(self) -> Stage | None:
        """The stage of a curriculum that `shown` names."""
        return next((s for s in self.stages if s.name == self.shown), None)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages of a curriculum."""
        return sum(s.all_steps for s in self.stages)

    def count(self, status: str) -> int:
        """Trials with this status."""
        return sum(t.status == status for t in self.trials)
