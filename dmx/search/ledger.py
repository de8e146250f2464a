"""The study's memory: Optuna's storage and a journal of every report, from which all is rebuilt.

Ray's own experiment snapshots are not used: they lag, lose trials and forget ASHA's rungs
(ray-notes.md, 1a and 7). Here a trial is what the Optuna storage says it is, each report is in
the journal before anything is decided from it, and a decision is a function of that history. So a
study that was killed continues as if it had not been.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from dmx.runs import layout
from dmx.runs.metrics import DEV_ACCURACY
from dmx.runs.objectives import DEFAULT, OBJECTIVES, directions, evaluate, missing
from dmx.runs.study import TrialResult, TrialStatus
from dmx.search.optuna_file import open_optuna
from dmx.search.samplers import GENERATIONAL_SAMPLERS, FixedPointSampler, Proposer
from dmx.search.space import SearchSpace, settings_of
from dmx.search.study_record import StudyRecord
from dmx.search.telling import is_value, name_objectives, report, tell
from dmx.search.trial_results import trial_result
from dmx.search.warm_start import ASKED_AFTER, ObservedTrial, past_trials, read_prior

logger = logging.getLogger("dmx.ledger")
TRIALS_DIR = "trials"


@dataclass
class _Live:
    """A running trial: Optuna's handle and its searched values."""

    trial: Trial
    point: dict[str, Any]


class Ledger:
    """Asks Optuna for points, records reports, and tells outcomes; survives kill -9 at any line.

    Args:
        folder: the study's folder. name: of the Optuna study. space: what is searched.
        num_trials: trials of the whole study. seed: of the sampler.
        sampler: see sampling.make_sampler. objectives: names, see dmx.runs.objectives.
        storage_timeout: how long a write waits for the storage.

    Raises:
        StageError: the study is damaged, or another process works on it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        space: SearchSpace,
        num_trials: int,
        seed: int,
        sampler: str = "tpe",
        objectives: tuple[str, ...] = DEFAULT,
        storage_timeout: float = 0.0,
    ) -> None:
        self.folder = folder
        self.space = space
        self.num_trials = num_trials
        self.objectives = objectives
        self._proposer = Proposer(
            kind=sampler,
            space=space,
            seed=seed,
            num_trials=num_trials,
            objectives=objectives,
            prior=read_prior(folder, space),
        )
        record = StudyRecord(folder / layout.JOURNAL_FILE, storage_timeout=storage_timeout)
        self.record, self.reports, self.outcomes = record, record.reports, record.outcomes
        self._live: dict[int, _Live] = {}
        try:
            self.study = open_optuna(
                folder / layout.OPTUNA_FILE,
                name,
                directions=directions(objectives),
                storage_timeout=storage_timeout,
            )
            name_objectives(self.study, [OBJECTIVES[o].label for o in objectives])
            self._orphans = self._recover()
        except BaseException:
            record.close()
            raise

    # -- asking -----------------------------------------------------------------------------

    def _recover(self) -> list[int]:
        """Bring the storage up to the journal, and list the trials that were cut off."""
        orphans = []
        self._next = 0
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state != TrialState.WAITING:
                self._next = frozen.number + 1  # Optuna hands out waiting ones by number
            if frozen.state != TrialState.RUNNING:
                continue
            outcome = self.outcomes.get(frozen.number)
            if outcome is None:
                orphans.append(frozen.number)
            else:
                self._tell(self._handle(frozen.number), outcome)
        return orphans

    @property
    def num_interrupted(self) -> int:
        """Trials of an earlier session that will be continued first."""
        return len(self._orphans)

    def forget_ended(self) -> None:
        """Drop interrupted trials whose end was found out after the journal was read."""
        self._orphans = [n for n in self._orphans if n not in self.outcomes]

    def remaining(self) -> int:
        """Trials still to run, interrupted ones included."""
        return max(self.num_trials - len(self.outcomes), 0)

    def next_trial(self) -> tuple[int, dict[str, Any]] | None:
        """(number, point) of the next trial to run: first interrupted ones, then new ones.

        The first trials are the space's start points. A proposal is a function of the seed, the
        number and the record alone (see sampling), so that a restart changes nothing.
        """
        self.record.journal.check()  # asking writes into Optuna's file
        if self._orphans:
            trial = self._handle(self._orphans.pop(0))
        else:
            if self._next >= self.num_trials:
                return None
            trial = self.study.ask()
            self._next = trial.number + 1
        after = len(self.outcomes)
        if self._proposer.kind in GENERATIONAL_SAMPLERS:
            after = trial.user_attrs.get(ASKED_AFTER, after)
            if ASKED_AFTER not in trial.user_attrs:
                trial.set_user_attr(ASKED_AFTER, after)
        number = trial.number
        start = self.space.start[number] if number < len(self.space.start) else {}
        fixed = self._frozen(number).system_attrs.get("fixed_params", {})  # enqueued by hand
        known = {**self.space.for_optuna({**start, **fixed}), **trial.params}
        earlier = self._past(number) if self._proposer.uses_history else []
        point = self._proposer.propose(number, earlier, known, after)
        self.study.sampler = FixedPointSampler(point)
        written = self.space.suggest(trial)
        assert written == point, (written, point)
        self._live[number] = _Live(trial, point)
        begun = {e["trial"] for e in self.record.journal.events if e.get("event") == "started"}
        if number not in begun:
            self.record.started(number, trial.params)
        return number, point

    def requeue(self, number: int) -> None:
        """Hand a running trial out once more: its process was lost, not the trial."""
        self._orphans.append(number)

    def _past(self, number: int) -> list[ObservedTrial]:
        """The trials before one, as a sampler may see them."""
        return past_trials(self.study.get_trials(deepcopy=False)[:number], self.outcomes)

    # -- telling ----------------------------------------------------------------------------

    def report(self, number: int, step: int, metrics: Mapping[str, Any]) -> bool:
        """Record one report; False when this step of this trial is already known."""
        flat = self.record.report(number, step, metrics)
        if flat is None:
            return False
        live = self._live.get(number)
        value = flat.get(DEV_ACCURACY)
        if live is not None and self._has_curves and is_value(value):
            report(live.trial, value, step)
        return True

    def finish(self, number: int, status: TrialStatus, error: str = "") -> None:
        """Record how a trial ended. A second ending of the same trial is ignored."""
        if number in self.outcomes:
            return
        live = self._live.pop(number, None)
        values = self._values(number)
        if status in ("COMPLETE", "PRUNED") and (lacking := missing(self.objectives, values)):
            status, error = "FAILED", error or lacking
        self.record.finish(number, status, values, error)
        trial = live.trial if live else self._handle(number)
        self._tell(trial, self.outcomes[number])

    def _values(self, number: int) -> tuple[float, ...]:
        """One value per objective, accuracy first; NaN where it was not measured."""
        reports = self.reports.get(number, {})
        return evaluate(self.objectives, [reports[s] for s in sorted(reports)])

    def _tell(self, trial: Trial, outcome: Mapping[str, Any]) -> None:
        curve = self.reports.get(trial.number, {}) if self._has_curves else {}
        tell(self.study, trial, outcome, curve, self._frozen(trial.number).intermediate_values)

    @property
    def _has_curves(self) -> bool:
        """Optuna has none for several objectives."""
        return len(self.objectives) == 1

    def _handle(self, number: int) -> Trial:
        return Trial(self.study, self._frozen(number)._trial_id)

    def _frozen(self, number: int) -> FrozenTrial:
        """One trial as Optuna has it; reading them all for each would grow with their square."""
        storage = self.study._storage
        study_id = self.study._study_id
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study_id, number))

    # -- reading ----------------------------------------------------------------------------

    def results(self) -> tuple[TrialResult, ...]:
        """Every trial that was started, by number."""
        return tuple(
            self._result(t)
            for t in self.study.get_trials(deepcopy=False)
            if t.state != TrialState.WAITING
        )

    def result(self, number: int) -> TrialResult:
        """One trial that was started."""
        return self._result(self._frozen(number))

    def point(self, number: int) -> Mapping[str, Any]:
        """The searched values of a trial."""
        if number in self._live:
            return self._live[number].point
        return settings_of(self._frozen(number).params)

    def _result(self, frozen: FrozenTrial) -> TrialResult:
        number = frozen.number
        live = self._live.get(number)
        return trial_result(
            frozen,
            folder=trial_folder(self.folder, number) / layout.BEST_DIR,
            params=live.point if live else settings_of(frozen.params),
            reports=self.reports.get(number, {}),
            values=dict(zip(self.objectives, self._values(number), strict=True)),
            error=self.outcomes.get(number, {}).get("error", ""),
            changes=self.record.exploits.get(number, {}),
        )

    def close(self) -> None:
        """Release the study's folder."""
        self.record.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Ray pickles all it is given into a snapshot that nobody reads: leave nothing there."""
        return (type(None), ())


def trial_folder(study_folder: Path, number: int) -> Path:
    """Where a trial keeps its checkpoints and its TensorBoard events."""
    return study_folder / TRIALS_DIR / f"{number:04d}"
