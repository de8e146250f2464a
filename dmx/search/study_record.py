"""What happened in a study, in its order: the events of the journal and what they add up to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx.errors import StageError
from dmx.runs.metrics import BEST_DEV_ACCURACY, DEV_ACCURACY, REPORT_KEYS
from dmx.runs.study import TrialStatus
from dmx.search.schedulers import GENERATION, Exploit
from dmx.storage.journal import Journal, expect

_NUMBER = (int, float)
_ENDS = ("COMPLETE", "PRUNED", "FAILED")


class StudyRecord:
    """The journal of a study; each event is on disk before anything is decided from it.

    Args:
        path: of the journal. storage_timeout: how long a write waits for the storage.

    Attributes:
        reports: trial -> step -> flat metrics. outcomes: trial -> its ending.
        exploits: trial -> step -> its values from then on, where it took over another trial.
        compared: steps at which a population was compared.

    Raises:
        StageError: the journal is damaged, or another process works on the study.
    """

    def __init__(self, path: Path, *, storage_timeout: float = 0.0) -> None:
        self.journal = Journal(path, storage_timeout=storage_timeout)
        self.reports: dict[int, dict[int, dict[str, Any]]] = {}
        self.outcomes: dict[int, dict[str, Any]] = {}
        self.exploits: dict[int, dict[int, Mapping[str, Any]]] = {}
        self.compared: set[int] = set()
        try:
            for event in self.journal.events:
                self._note(event)
        except BaseException:
            self.close()
            raise

    def _note(self, event: dict[str, Any]) -> None:
        """Take up one event of the journal.

        Raises:
            StageError: dmx did not write it.
        """
        if event.get("event") == "report":
            expect(event, trial=int, step=int, metrics=dict)
            metrics = event["metrics"]
            known = {k: _NUMBER for k in (DEV_ACCURACY, BEST_DEV_ACCURACY) if k in metrics}
            expect(metrics, **known, steps=int)
            self.reports.setdefault(event["trial"], {})[event["step"]] = metrics
        elif event.get("event") == "outcome":
            expect(event, trial=int, status=str, error=str, value=(*_NUMBER, type(None)))
            if event["status"] not in _ENDS:
                raise self._foreign(f"a trial that {str(event['status'])[:40]!r}")
            self.outcomes[event["trial"]] = event
        elif event.get("event") == GENERATION:
            expect(event, step=int, exploits=list)
            for exploit in event["exploits"]:
                if not isinstance(exploit, dict):
                    raise self._foreign(f"a takeover {str(exploit)[:40]!r}")
                expect(exploit, trial=int, source=int, params=dict)
                self.exploits.setdefault(exploit["trial"], {})[event["step"]] = exploit["params"]
            self.compared.add(event["step"])

    def _foreign(self, what: str) -> StageError:
        """What to say of an event that dmx cannot have written."""
        return StageError(
            f"{self.journal.path} tells of {what}, so dmx did not write it; restore the journal "
            "from a backup, or start under a new name."
        )

    def begin(self) -> None:
        """Record that a session begins: see journal.wall_seconds."""
        self._append(event="session")

    def started(self, number: int, params: Mapping[str, Any]) -> None:
        """Record which point was proposed, by the space's labels."""
        self._append(event="started", trial=number, params=dict(params))

    def report(self, number: int, step: int, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """Record one report; its flat metrics, or None when this step of this trial is known."""
        if step in self.reports.get(number, {}):
            return None
        flat = {k: metrics[k] for k in REPORT_KEYS if k in metrics}
        self._append(event="report", trial=number, step=step, metrics=flat)
        return flat

    def finish(self, number: int, status: TrialStatus, values: Sequence[float], error: str) -> None:
        """Record how a trial ended, with one value per objective."""
        best = values[0]
        several = {"values": list(values)} if len(values) > 1 and status != "FAILED" else {}
        value = best if math.isfinite(best) else None
        self._append(
            event="outcome", trial=number, status=status, value=value, **several, error=error
        )

    def compare(self, step: int, exploits: Sequence[Exploit]) -> None:
        """Record which trials of a population take over others at a step."""
        made = [{"trial": e.trial, "source": e.source, "params": dict(e.point)} for e in exploits]
        self._append(event=GENERATION, step=step, exploits=made)

    def history(self) -> list[tuple[int, int, Mapping[str, Any]]]:
        """(trial, step, metrics) of every report, in the order it was recorded."""
        return [
            (event["trial"], event["step"], event["metrics"])
            for event in self.journal.events
            if event.get("event") == "report"
        ]

    def _append(self, **event: Any) -> None:
        self.journal.append(**event, time=time.time())
        self._note(self.journal.events[-1])

    def close(self) -> None:
        """Release the study's folder."""
        self.journal.close()
