"""The watchdog: a trial that stands still has its process killed, and goes on in another one."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

from dmx.study.scheduler import NUMBER_KEY, is_report

import ray  # isort: skip
from ray import tune  # isort: skip

logger = logging.getLogger("dmx.study")

LEAST_SECONDS = 1800.0
"""Nothing is called a hang sooner, unless the user says so: a first step may compile for long."""
TIMES_MEDIAN = 10.0
START_SECONDS = 120.0
"""A process has at least so long until its first report: it imports, opens data, may compile."""
_LOOK_SECONDS = 1.0


def patience(intervals: list[float], fixed: float | None) -> float:
    """Seconds without a report after which a trial hangs.

    Args:
        intervals: seconds between reports of the study so far. fixed: what the user said, or None.
    """
    if fixed is not None:
        return fixed
    usual = statistics.median(intervals) if intervals else 0.0
    return max(LEAST_SECONDS, TIMES_MEDIAN * usual)


class Watchdog(tune.Callback):
    """Kills the process of a trial that has not reported for too long; Tune then restarts it.

    Args:
        timeout_seconds: see patience. kill: ends an actor's process; Ray's own in the end sends
            SIGKILL, which a stopped process cannot ignore either. clock: monotonic seconds.
    """

    def __init__(
        self,
        timeout_seconds: float | None,
        *,
        kill: Callable[[Any], None] = ray.kill,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_seconds, self._kill, self._clock = timeout_seconds, kill, clock
        self._since: dict[Any, float] = {}  # it was last heard of
        self._reported: dict[Any, float] = {}
        self._started: set[Any] = set()
        self._intervals: list[float] = []
        self._looked = clock()
        self.hung: dict[int, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its time runs."""
        self._since[trial] = self._reported[trial] = self._clock()
        self._started.add(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """It is alive; the last thousand intervals say what is usual."""
        now = self._clock()
        self._started.discard(trial)
        self._since[trial] = now
        if is_report(result):
            if (since := self._reported.get(trial)) is not None:
                self._intervals = [*self._intervals[-999:], now - since]
            self._reported[trial] = now
            self.hung.pop(trial.config[NUMBER_KEY], None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its time is over."""
        self._since.pop(trial, None)
        self._reported.pop(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its time is over."""
        self._since.pop(trial, None)
        self._reported.pop(trial, None)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It waits for a process."""
        self._since.pop(trial, None)
        self._reported.pop(trial, None)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at all running trials; Tune calls this many times a second."""
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        usual = patience(self._intervals, self._timeout_seconds)
        for trial, since in list(self._since.items()):
            actor = trial.temporary_state.ray_actor
            limit = max(usual, START_SECONDS) if trial in self._started else usual
            if now - since <= limit or actor is None:
                continue
            number = trial.config[NUMBER_KEY]
            self.hung[number] = f"it made no progress for {limit:.0f} s"
            logger.warning(
                "trial %d made no progress for %.0f s; its process is killed and it continues "
                "from its last checkpoint.",
                number,
                limit,
            )
            del self._since[trial]  # the kill is answered by on_trial_recover or on_trial_error
            self._kill(actor)

    def __reduce__(self) -> tuple[Any, ...]:
        return (tune.Callback, ())  # see Ledger.__reduce__
