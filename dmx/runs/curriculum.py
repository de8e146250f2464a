"""What a curriculum's journal says: the state of every stage, as a pure function of the events."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmx.runs.metrics import DEV_ACCURACY, TRAIN_SECONDS
from dmx.storage.journal import expect

StageStatus = Literal["waiting", "running", "passed", "failed"]
STAGES_DIR = "stages"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a stage.

    Attributes:
        number: counts all tries of the stage, those before a `--from-stage` included; its folder.
        retry: counts tries since the stage was last begun: 0, 1, ...; seeds depend on it.
        config: the RunConfig it trains, plain. source: where its weights come from.
        spec: what the stage said when it was launched (StageConfig.plain).
        started: time of the first launch. reports: metrics by step.
        decision: the event that ended it, or None while it runs.
    """

    number: int
    retry: int
    config: Mapping[str, Any]
    source: Mapping[str, Any]
    spec: Mapping[str, Any]
    data: Mapping[str, Any]
    started: float
    reports: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    decision: Mapping[str, Any] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps taken, as far as reported; of a search, those of its best trial."""
        return max(self.reports, default=0)

    @property
    def search(self) -> Mapping[str, Any] | None:
        """What a search found and cost; None of a run, or before its end.

        {"trial", "num_trials", "params", "config", "steps", "train_seconds"}: the first ones of its
        best trial, the last two of all.
        """
        search: Mapping[str, Any] | None = (self.decision or {}).get("search")
        return search

    @property
    def trained(self) -> Mapping[str, Any]:
        """The plain RunConfig of its checkpoints: of a search, its best trial's."""
        config: Mapping[str, Any] = self.config if self.search is None else self.search["config"]
        return config

    @property
    def all_steps(self) -> int:
        """Optimizer steps of all that was trained in it."""
        return self.steps if self.search is None else int(self.search["steps"])

    @property
    def all_seconds(self) -> float:
        """Training time of all that was trained in it."""
        return self.seconds if self.search is None else float(self.search[TRAIN_SECONDS])

    @property
    def last(self) -> Mapping[str, Any]:
        """The last report."""
        return self.reports[self.steps] if self.reports else {}

    def metric(self, name: str) -> float:
        """A metric of the last report; NaN where it was not reported."""
        value = self.last.get(name)
        return float(value) if isinstance(value, int | float) else math.nan

    @property
    def dev_accuracies(self) -> tuple[float, ...]:
        """Dev accuracy at every evaluation, in order."""
        return tuple(self.reports[s][DEV_ACCURACY] for s in sorted(self.reports))

    @property
    def seconds(self) -> float:
        """Training time, as far as reported; of a search, that of its best trial."""
        return float(self.last.get(TRAIN_SECONDS, 0.0))

    @property
    def num_classes(self) -> int:
        """Classes of its data; chance is 1 / num_classes."""
        return int(self.config["model"]["num_classes"])

    @property
    def judging(self) -> Mapping[str, Any]:
        """Gate and on_fail by which it was judged, or would be when it was launched."""
        if self.decision is not None:
            judging: Mapping[str, Any] = self.decision["judging"]
            return judging
        return {key: self.spec[key] for key in ("gate", "on_fail")}


@dataclass(frozen=True, kw_only=True)
class StageState:
    """One stage.

    Attributes:
        attempts: since the stage was last begun. discarded: those before (--from-stage).
        tests: test accuracy by the name of the stage whose test split it was; None where the
            weights do not fit that stage's model.
    """

    attempts: tuple[Attempt, ...] = ()
    discarded: tuple[Attempt, ...] = ()
    tests: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def num_attempts(self) -> int:
        """The next attempt's number; numbers are never used twice."""
        return max((a.number for a in (*self.discarded, *self.attempts)), default=-1) + 1

    @property
    def current(self) -> Attempt | None:
        """The latest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def next_step(self) -> str | None:
        """What the last decision said: promote, retry, longer, stop; None while undecided."""
        if self.current is None or self.current.decision is None:
            return None
        return str(self.current.decision["next"])

    @property
    def status(self) -> StageStatus:
        """Where the stage stands."""
        if self.current is None:
            return "waiting"
        return {"promote": "passed", "stop": "failed"}.get(self.next_step or "", "running")  # type: ignore[return-value]

    @property
    def promoted(self) -> Mapping[str, Any] | None:
        """{"attempt", "path", "step", "dev_accuracy", "sha256"} of the promoted checkpoint."""
        if self.status != "passed" or self.current is None or self.current.decision is None:
            return None
        checkpoint = self.current.decision["checkpoint"]
        assert isinstance(checkpoint, Mapping)
        return checkpoint

    @property
    def shown(self) -> Attempt | None:
        """The promoted attempt, else the latest."""
        promoted = self.promoted
        for attempt in self.attempts:
            if promoted is not None and attempt.number == promoted["attempt"]:
                return attempt
        return self.current


@dataclass(frozen=True, kw_only=True)
class History:
    """A whole run.

    Attributes:
        stages: by name, of those that were ever begun. created: time of the first session, or 0.
        plan: {"name", "task", "parent", "attention"} of every stage of the file, in its order, as
            the latest session found it. last_stage: see CurriculumConfig.last.
    """

    stages: Mapping[str, StageState] = field(default_factory=dict)
    created: float = 0.0
    plan: tuple[Mapping[str, Any], ...] = ()
    last_stage: str = ""

    def stage(self, name: str) -> StageState:
        """The state of a stage; a fresh one for a stage that was never begun."""
        return self.stages.get(name, StageState())


def attempt_folder(run_folder: Path, stage: str, number: int) -> Path:
    """Where an attempt keeps its checkpoints: `best` and `last`."""
    return run_folder / STAGES_DIR / stage / f"attempt-{number}"


def fold(events: Iterable[Mapping[str, Any]]) -> History:
    """The state after all events."""
    history = History()
    for event in events:
        history = advance(history, event)
    return history


_NUMBER = (int, float)
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "created": {"time": _NUMBER},
    "session": {"time": _NUMBER, "host": str, "pid": int},
    "reset": {"stages": list},
    "started": {
        **{"stage": str, "attempt": int, "retry": int, "config": dict, "source": dict},
        **{"spec": dict, "data": dict, "time": _NUMBER},
    },
    "report": {"stage": str, "attempt": int, "step": int, "metrics": dict},
    "decided": {"stage": str, "attempt": int, "next": str},
    "tested": {"stage": str, "on": str, "accuracy": (*_NUMBER, type(None))},
}


def advance(history: History, event: Mapping[str, Any]) -> History:
    """The state after one more event; events of other kinds change nothing.

    Raises:
        StageError: the event lacks what dmx writes into its kind.
    """
    kind = event.get("event")
    if isinstance(kind, str):
        expect(event, **_FIELDS.get(kind, {}))
    if kind == "created":
        return dataclasses.replace(history, created=event["time"])
    if kind == "session" and "stages" in event:
        expect(event, stages=list, last_stage=str)
        for stage in event["stages"]:
            named = stage if isinstance(stage, dict) else {}
            expect({**named, "event": kind}, name=str, task=str, attention=str)
        return dataclasses.replace(
            history, plan=tuple(event["stages"]), last_stage=event["last_stage"]
        )
    if kind == "reset":
        again = event["stages"]
        kept = {
            name: StageState(discarded=(*state.discarded, *state.attempts))
            if name in again
            else _without_tests_on(state, again)
            for name, state in history.stages.items()
        }
        return dataclasses.replace(history, stages=kept)
    if kind == "decided" and event["next"] == "promote":
        expect(event, checkpoint=dict)
        expect({**event["checkpoint"], "event": kind}, attempt=int, path=str)
    if kind == "decided" and event.get("search") is not None:
        expect(event, search=dict)
        expect({**event["search"], "event": kind}, trial=int, num_trials=int, params=dict)
        expect({**event["search"], "event": kind}, config=dict, steps=int, train_seconds=_NUMBER)
    if kind not in ("started", "report", "decided", "tested"):
        return history
    name = event["stage"]
    state = _STEPS[kind](history.stage(name), event)
    return dataclasses.replace(history, stages={**history.stages, name: state})


def _without_tests_on(state: StageState, stages: Collection[str]) -> StageState:
    """A stage that is trained again may have another task or other data since."""
    kept = {on: accuracy for on, accuracy in state.tests.items() if on not in stages}
    return dataclasses.replace(state, tests=kept)


def _started(state: StageState, event: Mapping[str, Any]) -> StageState:
    attempt = Attempt(
        number=event["attempt"],
        retry=event["retry"],
        config=event["config"],
        source=event["source"],
        spec=event["spec"],
        data=event["data"],
        started=event["time"],
    )
    return dataclasses.replace(state, attempts=(*state.attempts, attempt))


def _report(state: StageState, event: Mapping[str, Any]) -> StageState:
    def add(attempt: Attempt) -> Attempt:
        reports = {**attempt.reports, event["step"]: event["metrics"]}
        return dataclasses.replace(attempt, reports=reports)

    return _change(state, event, add)


def _decided(state: StageState, event: Mapping[str, Any]) -> StageState:
    return _change(state, event, lambda a: dataclasses.replace(a, decision=event))


def _tested(state: StageState, event: Mapping[str, Any]) -> StageState:
    return dataclasses.replace(state, tests={**state.tests, event["on"]: event["accuracy"]})


def _change(state: StageState, event: Mapping[str, Any], change: Any) -> StageState:
    attempts = tuple(change(a) if a.number == event["attempt"] else a for a in state.attempts)
    return dataclasses.replace(state, attempts=attempts)


_STEPS = {"started": _started, "report": _report, "decided": _decided, "tested": _tested}
