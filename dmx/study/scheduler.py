"""What Ray Tune asks for a decision: each report is recorded, then the study's rungs are asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from dmx.runs.metrics import DEV_ACCURACY, FAILURE, STEPS, UNDER_WAY
from dmx.search.ledger import Ledger
from dmx.search.rungs import Brackets

NUMBER_KEY = "trial_number"


def is_report(result: Mapping[str, Any]) -> bool:
    """Whether it tells of an evaluation, and not of a failure or of training that goes on."""
    return STEPS in result and FAILURE not in result and UNDER_WAY not in result


class RecordingScheduler(TrialScheduler):
    """Records every report; Ray decides nothing.

    Args:
        brackets: what stops trials; None stops none.
    """

    def __init__(self, ledger: Ledger, brackets: Brackets | None = None) -> None:
        self._ledger, self._brackets = ledger, brackets
        for number, step, metrics in ledger.record.history():
            self._decide(number, step, metrics)

    @property
    def stopped(self) -> Mapping[int, str]:
        """Trial -> why it was stopped."""
        return {} if self._brackets is None else self._brackets.stopped

    def _decide(self, number: int, step: int, metrics: Mapping[str, Any]) -> bool:
        value = metrics.get(DEV_ACCURACY)
        if self._brackets is None or value is None:
            return True
        return self._brackets.report(number, step, value)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        pass

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        pass

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        pass

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Record the report, then decide; one known from before a crash decides nothing new."""
        if FAILURE in result:
            return self.STOP
        if not is_report(result):
            return self.CONTINUE
        number, step = trial.config[NUMBER_KEY], int(result[STEPS])
        if self._ledger.report(number, step, result):
            self._decide(number, step, result)
        return self.STOP if number in self.stopped else self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """The last report reaches a scheduler only here."""
        number = trial.config[NUMBER_KEY]
        if is_report(result) and self._ledger.report(number, int(result[STEPS]), result):
            self._decide(number, int(result[STEPS]), result)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The first trial that waits."""
        for trial in tune_controller.get_trials():
            if trial.status in (Trial.PENDING, Trial.PAUSED):
                return trial
        return None

    def debug_string(self) -> str:
        """For Ray's own status output."""
        return "dmx decides"
