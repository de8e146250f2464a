"""ASHA and Hyperband whose rungs survive a restart: Ray Tune's, fed again with the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from dmx import records as keys
from dmx.search.brackets import bracket_of
from dmx.search.ledger import Ledger

NUMBER_KEY = "trial_number"


def is_report(result: Mapping[str, Any]) -> bool:
    """Whether it tells of an evaluation, and not of a failure or of training that goes on."""
    return keys.STEPS in result and keys.FAILURE not in result and keys.UNDER_WAY not in result


@dataclass(frozen=True)
class _Known:
    """What the bracket needs of a trial: a key that is the same before and after a restart."""

    trial_id: str


class DurableAsha(AsyncHyperBandScheduler):
    """ASHA (Li et al. 2020, arXiv 1810.05934) over optimizer steps.

    Rungs are keyed by trial number, not by Ray's ids, which change on a restart. Decisions are a
    function of the reports in their order, so replaying the journal rebuilds them exactly.

    Args:
        ledger: the study's memory. max_steps: the full budget. grace_steps: no trial stops before.
        reduction_factor: 1/factor of the trials pass each rung.
        brackets: more than one is asynchronous Hyperband (section 3.3 of the same paper): each
            bracket has rungs of its own. Ray draws a trial's bracket at random; here it is a
            function of its number (see brackets.bracket_of).
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        max_steps: int,
        grace_steps: int,
        reduction_factor: float,
        brackets: int = 1,
    ) -> None:
        super().__init__(
            time_attr=keys.STEPS,
            metric=keys.DEV_ACCURACY,
            mode="max",
            max_t=max_steps,
            grace_period=grace_steps,
            reduction_factor=reduction_factor,
            brackets=brackets,
        )
        self._max_steps = max_steps
        self._ledger = ledger
        self.stopped: set[int] = set()
        self.reasons: dict[int, str] = {}
        for number, step, metrics in ledger.record.history():
            self._decide(number, step, metrics)

    def _decide(self, number: int, step: int, metrics: Mapping[str, Any]) -> str:
        value = metrics.get(keys.DEV_ACCURACY)
        if value is None or step >= self._max_steps:
            return TrialScheduler.CONTINUE  # a finished trial ends by itself, as COMPLETE
        known: Any = _Known(f"n{number}")
        bracket = bracket_of(number, len(self._brackets), self._reduction_factor)
        rungs = self._brackets[bracket]._rungs  # highest first
        rung = next((r for r in rungs if step >= r[0] and known.trial_id not in r[1]), None)
        needed = None if rung is None else self._brackets[bracket].cutoff(rung[1])
        action: str = self._brackets[bracket].on_result(known, step, value)
        if action == TrialScheduler.STOP:
            self.stopped.add(number)
            assert rung is not None and needed is not None
            self.reasons[number] = f"rung {rung[0]:.0f}: {value:.4f}, and {needed:.4f} was needed"
        return action

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Record the report, then decide; one known from before a crash decides nothing new."""
        if keys.FAILURE in result:
            return TrialScheduler.STOP
        if not is_report(result):
            return TrialScheduler.CONTINUE
        number, step = trial.config[NUMBER_KEY], int(result[keys.STEPS])
        if not self._ledger.report(number, step, result):
            return TrialScheduler.STOP if number in self.stopped else TrialScheduler.CONTINUE
        return self._decide(number, step, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """The last report reaches a scheduler only here; it is recorded, and fills the rungs."""
        number = trial.config[NUMBER_KEY]
        if is_report(result) and self._ledger.report(number, int(result[keys.STEPS]), result):
            self._decide(number, int(result[keys.STEPS]), result)
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing is kept by Ray's id."""
        self._trial_info.pop(trial.trial_id, None)

    def rungs(self, bracket: int = 0) -> list[tuple[int, dict[int, float]]]:
        """(steps, {trial number: dev accuracy}) of each rung of a bracket, lowest first."""
        return [
            (int(milestone), {int(k[1:]): float(v) for k, v in recorded.items()})
            for milestone, recorded in reversed(self._brackets[bracket]._rungs)
        ]


class RecordingFifo(TrialScheduler):
    """No early stopping: every trial runs its full budget, and every report is recorded."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.stopped: set[int] = set()
        self.reasons: dict[int, str] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accepts Tune's metric; it is not used."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing to prepare."""

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """The searcher records the failure."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Record and go on."""
        if keys.FAILURE in result:
            return self.STOP
        if is_report(result):
            self._ledger.report(trial.config[NUMBER_KEY], int(result[keys.STEPS]), result)
        return self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Record the last report."""
        if is_report(result):
            self._ledger.report(trial.config[NUMBER_KEY], int(result[keys.STEPS]), result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing is kept."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first trial that waits."""
        for trial in tune_controller.get_trials():
            if trial.status in (Trial.PENDING, Trial.PAUSED):
                return trial
        return None

    def debug_string(self) -> str:
        """For Ray's own status output."""
        return "every trial runs its full budget"

    def rungs(self) -> list[tuple[int, dict[int, float]]]:
        """There are none."""
        return []
