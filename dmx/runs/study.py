"""A study and its trials."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from dmx.errors import StageError
from dmx.runs import events, layout
from dmx.runs.layout import BEST_DEV_ACCURACY, DEV_ACCURACY, REPORT_KEYS
from dmx.runs.run import UNKNOWN, Run
from dmx.runs.trial import DEFAULT, OBJECTIVES, Trial, best_of, number, pareto_front

if TYPE_CHECKING:
    import pandas

SamplerKind = Literal["tpe", "random", "cmaes", "gp", "nsga2"]
SAMPLERS = get_args(SamplerKind)
"""How points are proposed; see dmx.search.samplers."""

SchedulerKind = Literal["asha", "hyperband", "pbt", "none"]
SCHEDULERS = get_args(SchedulerKind)
"""What happens to trials that do worse than others; see dmx.search.schedulers."""


LEAST_FACTOR = 1.1
"""Nearer to 1 there are thousands of rungs, and none of them decides much."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a study searched.

    Attributes:
        searched: Optuna's name -> [kind, *values], as in the search space.
        grace_steps, reduction_factor: of ASHA and Hyperband.
        objectives: names, see dmx.runs.trial.
        warm_start: the earlier studies it learnt from.
    """

    searched: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "none"
    sampler: str = UNKNOWN
    seed: int | None = None
    max_steps: int = 1
    num_trials: int = 0
    grace_steps: int = 1
    reduction_factor: float = 3.0
    objectives: tuple[str, ...] = DEFAULT
    warm_start: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FinalSeeds:
    """The best setting, trained again from other seeds. Accuracies lie in 0..1."""

    seeds: tuple[int, ...]
    dev_accuracies: tuple[float, ...]
    test_accuracies: tuple[float, ...]


class Report(NamedTuple):
    """A trial's evaluation, in the order of the journal. `time`: seconds since 1970, or 0."""

    trial: int
    step: int
    metrics: Mapping[str, Any]
    time: float

    @property
    def dev_accuracy(self) -> float:
        """In 0..1, or NaN."""
        return number(self.metrics, DEV_ACCURACY)


class Takeover(NamedTuple):
    """At `step`, `trial` went on from the weights of `source`, with the values `params`."""

    step: int
    trial: int
    source: int
    params: Mapping[str, Any]


class Study(Run):
    """A study, finished, interrupted or running; the fold that its driver decides by.

    Attributes:
        by_number: trial -> Trial. history: every report, in the order it was recorded.
        outcomes: trial -> its Outcome, in the order in which they ended.
        compared: steps at which a population was compared. takeovers: who copied whom, in order.
    """

    kind = "study"
    known_events = events.STUDY

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.by_number: dict[int, Trial] = {}
        self.history: list[Report] = []
        self.outcomes: dict[int, Mapping[str, Any]] = {}
        self.compared: set[int] = set()
        self.takeovers: list[Takeover] = []
        self._final: Mapping[str, Any] | None = None

    def trial(self, number: int) -> Trial:
        """A trial, known from now on."""
        if number not in self.by_number:
            folder = layout.trial_folder(self.folder, number)
            self.by_number[number] = Trial(number=number, folder=folder, objectives=self.objectives)
        return self.by_number[number]

    def _fold(self, name: str, event: Mapping[str, Any]) -> None:
        if name == "settings":
            self._check_settings()
            for trial in self.by_number.values():
                trial.objectives = self.objectives
        elif name == "started":
            trial = self.trial(event["trial"])
            trial.drawn, trial.started_after = event["params"], len(self.outcomes)
        elif name == "report":
            number, step, metrics = event["trial"], event["step"], event["metrics"]
            self.history.append(Report(number, step, metrics, event.get("time", 0.0)))
            self.trial(number).curve[step] = metrics
        elif name == "outcome":
            trial = self.trial(event["trial"])
            trial.status, trial.error = event["status"], event["error"]
            self.outcomes[trial.number] = event
            self._final = None  # the best one may be another by now
        elif name == "compared":
            step = event["step"]
            self.compared.add(step)
            for exploit in event["exploits"]:
                taken = Takeover(step, exploit["trial"], exploit["source"], exploit["params"])
                self.takeovers.append(taken)
                self.trial(taken.trial).changes[step] = taken.params
        elif name == "final":
            self._final = event

    def _check_settings(self) -> None:
        wrong = events.unsound(self.settings, events.STUDY_SETTINGS)
        for name, found in self.settings.get("searched", {}).items() if not wrong else ():
            kind, *values = found if isinstance(found, list) and found else ("",)
            numbers = kind == "choice" or not any(isinstance(v, str) for v in values)
            plain = all(isinstance(v, str | int | float) for v in values)
            if not isinstance(kind, str) or not values or not plain or not numbers:
                wrong = f"searched.{name}"
        if not self.settings.get("reduction_factor", LEAST_FACTOR) >= LEAST_FACTOR:
            wrong = wrong or "reduction_factor"
        if wrong or any(o not in OBJECTIVES for o in self.objectives):
            raise StageError(
                f"its settings have no sound {wrong or 'objectives'}; restore it from a backup, or "
                "start under a new name."
            )

    # -- what it is -------------------------------------------------------------------------

    @property
    def task(self) -> str:
        return str(self.settings.get("task", UNKNOWN))

    @property
    def attention(self) -> str:
        """As the study is called, with its size where that is not searched: `butterfly-64`."""
        return str(self.session.get("attention") or self.settings.get("attention", UNKNOWN))

    @property
    def objectives(self) -> tuple[str, ...]:
        """What it optimises, accuracy first."""
        return tuple(self.settings.get("objectives") or DEFAULT)

    @property
    def several(self) -> tuple[str, ...]:  # type: ignore[override]
        """The objectives of a search for a Pareto front; () of any other one."""
        return self.objectives if len(self.objectives) > 1 else ()

    @property
    def is_population(self) -> bool:  # type: ignore[override]
        """Whether its trials took over each other's weights (--scheduler pbt)."""
        return self.settings.get("scheduler") == "pbt"

    @property
    def search(self) -> Search:  # type: ignore[override]
        names = Search.__dataclass_fields__
        found = {name: value for name, value in self.settings.items() if name in names}
        found["grace_steps"] = min(max(found.get("grace_steps", 1), 1), found.get("max_steps", 1))
        found["warm_start"] = tuple(found.get("warm_start", {}).get("runs", ()))
        return Search(**{**found, "objectives": self.objectives})

    # -- what came of it --------------------------------------------------------------------

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(self.by_number[n] for n in sorted(self.by_number))

    @property
    def complete(self) -> bool:
        """Whether all its trials have ended."""
        return bool(self.outcomes) and len(self.outcomes) >= self.settings.get("num_trials", 0)

    @property
    def best_trials(self) -> tuple[Trial, ...]:
        if not self.several:
            return super().best_trials
        points = {t.number: tuple(t.values.values()) for t in self.whole}
        return tuple(self.by_number[n] for n in pareto_front(self.several, points))

    @property
    def best_trial(self) -> Trial | None:
        """The most accurate trial (the earlier one on a tie); of the front, where there is one."""
        return best_of(self.best_trials if self.several else ()) or best_of(self.trials)

    @property
    def best_params(self) -> Mapping[str, Any]:
        """The searched values of the best trial's best checkpoint; {} where there is none."""
        best = self.best_trial
        return {} if best is None else best.params_at(best.best_step)

    @property
    def best_value(self) -> float:
        """Its dev accuracy, in 0..1, or NaN."""
        return math.nan if self.best_trial is None else self.best_trial.best

    @property
    def best_step(self) -> int | None:
        return None if self.best_trial is None else self.best_trial.best_step

    @property
    def _tested(self) -> Mapping[str, Any]:
        """The test of the best trial, if that is the one that was tested."""
        return self._final if self._final and self._final["trial"] == self.best else {}

    @property
    def finals(self) -> FinalSeeds | None:  # type: ignore[override]
        """What retraining with other seeds gave, or None."""
        if not self._tested.get("seeds"):
            return None
        names = ("seeds", "dev_accuracies", "test_accuracies")
        return FinalSeeds(**{name: tuple(self._tested[name]) for name in names})

    def trial_rows(self) -> list[dict[str, Any]]:
        """A row a trial, each with every column: trials.csv, the report's CSV, trials_dataframe."""
        front = {t.number for t in self.best_trials}
        measured = [key for key in REPORT_KEYS if key != BEST_DEV_ACCURACY]
        params = sorted({key for t in self.trials for key in t.params})
        rows = []
        for trial in self.trials:
            row: dict[str, Any] = {"trial": trial.number, "status": trial.status}
            row[BEST_DEV_ACCURACY] = trial.best
            if self.several:
                row["front"] = "yes" if trial.number in front else "no"
                row |= {f"objective.{name}": value for name, value in trial.values.items()}
            row |= {key: trial.last_report.get(key) for key in measured}
            row |= {key: trial.params.get(key) for key in params}
            if self.is_population:
                row["changes"] = json.dumps(trial.changes) if trial.changes else None
            rows.append({**row, "data": self.settings.get("data", UNKNOWN), "error": trial.error})
        return rows

    def trials_dataframe(self) -> pandas.DataFrame:
        """The rows of trials.csv."""
        import pandas

        return pandas.DataFrame(self.trial_rows())

    # -- its best checkpoint ----------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        """The copy of the best checkpoint; before there is one, that of the best trial so far."""
        own, best = self.folder / layout.BEST_DIR, self.best_trial
        if best is None or (self._final and (own / layout.CONFIG_FILE).is_file()):
            return own
        assert best.folder is not None
        return best.folder / layout.BEST_DIR
