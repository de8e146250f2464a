"""A curriculum's stages and their attempts: a pure fold of the journal's events."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmx.runs import events
from dmx.runs.layout import BEST_DEV_ACCURACY, DEV_ACCURACY, TRAIN_SECONDS
from dmx.runs.trial import number

StageStatus = Literal["waiting", "running", "passed", "failed"]
_PROGRESS = {
    "promote": "passed",
    "stop": "failed",
    "retry": "trying again",
    "longer": "training on",
}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a stage.

    Attributes:
        number: counts all tries of the stage, those before a `--from-stage` included; its folder.
        retry: counts tries since the stage was last begun: 0, 1, ...; seeds depend on it.
        config: the RunConfig it trains, plain. source: where its weights come from.
        spec: what the stage said when it was launched (StageConfig.plain).
        attention: its label, or "". started: time of the first launch. curve: metrics by step.
        decision: the event that ended it, or None while it runs.
    """

    number: int
    retry: int
    config: Mapping[str, Any]
    source: Mapping[str, Any]
    spec: Mapping[str, Any]
    data: Mapping[str, Any]
    started: float
    attention: str = ""
    curve: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    decision: Mapping[str, Any] | None = None

    @property
    def reports(self) -> tuple[Mapping[str, Any], ...]:
        """Metrics at each evaluation, in order; of a search, those of its best trial."""
        return tuple(self.curve[step] for step in sorted(self.curve))

    @property
    def steps(self) -> int:
        """Optimizer steps taken, as far as reported; of a search, those of its best trial."""
        return max(self.curve, default=0)

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
        return self.curve[self.steps] if self.curve else {}

    def metric(self, name: str) -> float:
        """A metric of the last report; NaN where it was not reported."""
        value = self.last.get(name)
        return float(value) if isinstance(value, int | float) else math.nan

    @property
    def dev_accuracies(self) -> tuple[float, ...]:
        """Dev accuracy at every evaluation, in order."""
        return tuple(report[DEV_ACCURACY] for report in self.reports)

    @property
    def best(self) -> float:
        """The highest dev accuracy, or NaN."""
        found = [number(r, key) for r in self.reports for key in (DEV_ACCURACY, BEST_DEV_ACCURACY)]
        return max((v for v in found if math.isfinite(v)), default=math.nan)

    @property
    def passed(self) -> bool | None:
        """What its gate said; None while it has not decided."""
        return (self.decision or {}).get("passed")

    @property
    def reason(self) -> str:
        """Why its gate said so."""
        return str((self.decision or {}).get("reason", ""))

    @property
    def label(self) -> str:
        """Its attention; of a search, its best trial's."""
        return str((self.search or {}).get("attention") or self.attention)

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
class Stage:
    """One stage. Accuracies lie in 0..1, NaN where unknown.

    Attributes:
        attempts: since the stage was last begun. discarded: those before (--from-stage).
        tests: test accuracy by the name of the stage whose test split it was; None where the
            weights do not fit that stage's model.
        name, planned: the stage as the curriculum's file has it. goal: the curriculum's last stage.
        folder: the curriculum's.
    """

    attempts: tuple[Attempt, ...] = ()
    discarded: tuple[Attempt, ...] = ()
    tests: Mapping[str, float | None] = field(default_factory=dict)
    name: str = ""
    planned: Mapping[str, Any] = field(default_factory=dict)
    goal: str = ""
    folder: Path = Path()

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
    def promoted_attempt(self) -> int | None:
        """The number of the attempt whose checkpoint the next stage gets, or None."""
        return None if self.promoted is None else int(self.promoted["attempt"])

    @property
    def shown(self) -> Attempt | None:
        """The promoted attempt, else the latest."""
        promoted = self.promoted
        for attempt in self.attempts:
            if promoted is not None and attempt.number == promoted["attempt"]:
                return attempt
        return self.current

    # -- of a stage in its curriculum ---------------------------------------------------------

    @property
    def progress(self) -> str:
        """Its status in words: a running stage may be `trying again` or `training on`."""
        return _PROGRESS.get(self.next_step or "", self.status)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The plain RunConfig of its checkpoint, or None."""
        return None if self.shown is None else self.shown.trained or None

    @property
    def task(self) -> str:
        """What it trains on."""
        planned = self.planned.get("task", self.name)
        return str(planned if self.shown is None else self.shown.config.get("task", planned))

    @property
    def attention(self) -> str:
        """With its size; of a search, its best trial's."""
        planned = str(self.planned.get("attention", ""))
        return planned if self.shown is None else self.shown.label or planned

    @property
    def source(self) -> Mapping[str, Any]:
        """Where its weights came from: `path`, and `stage` if that is one; {} for fresh ones."""
        return self.attempts[0].source if self.attempts else {}

    @property
    def parent(self) -> str | None:
        """The stage it started from, or where else its weights came from, or None."""
        if self.attempts:
            return self.source.get("stage") or self.source.get("path") or None
        return self.planned.get("parent")

    @property
    def reinit(self) -> tuple[str, ...]:
        """Weights that started afresh."""
        spec = self.shown.spec if self.shown is not None and self.source else {}
        return tuple(map(str, spec.get("reinit") or ()))

    @property
    def data(self) -> str:
        """The data's label, or ""."""
        return "" if self.shown is None else str(self.shown.data.get("label", ""))

    @property
    def data_checksum(self) -> str:
        """Of the data, or ""."""
        return "" if self.shown is None else str(self.shown.data.get("checksum") or "")

    @property
    def data_root(self) -> str:
        """The folder of all data, or ""."""
        found = "" if self.shown is None else str(self.shown.data.get("folder") or "")
        return str(Path(found).parent) if found else ""

    @property
    def steps(self) -> int:
        """Optimizer steps of the promoted attempt, else of the latest."""
        return 0 if self.shown is None else self.shown.steps

    @property
    def all_steps(self) -> int:
        """Optimizer steps of all attempts; of searches, of all their trials."""
        return sum(a.all_steps for a in self.attempts)

    @property
    def seconds(self) -> float:
        """Training time of all attempts; of searches, of all their trials."""
        return math.fsum(a.all_seconds for a in self.attempts)

    @property
    def dev_accuracy(self) -> float:
        """Of the promoted checkpoint, else the best so far."""
        promoted = number(self.promoted or {}, DEV_ACCURACY)
        if math.isfinite(promoted) or self.shown is None:
            return promoted
        return self.shown.best

    @property
    def test_accuracy(self) -> float:
        """On its own test split."""
        return number(self.tests, self.name)

    @property
    def test_on_last(self) -> float:
        """On the test split of the curriculum's last stage."""
        return number(self.tests, self.goal)

    @property
    def checkpoint(self) -> str:
        """The folder of the promoted checkpoint, else of the one last judged, or ""."""
        judged = {} if self.shown is None else (self.shown.decision or {}).get("checkpoint")
        return self._place((self.promoted or judged or {}).get("path"))

    @property
    def start(self) -> str:
        """The folder of the weights that its training started from, or ""."""
        return "" if self.shown is None else self._place(self.shown.source.get("path"))

    def _place(self, path: object) -> str:
        """A path of the journal's, which names what lies in the run by what follows its folder."""
        return str(self.folder / str(path)) if path else ""


@dataclass(frozen=True, kw_only=True)
class History:
    """A whole run.

    Attributes:
        stages: by name, of those that were ever begun. created: time of the first session, or 0.
        plan: {"name", "task", "parent", "attention"} of every stage of the file, in its order, as
            the latest session found it. last_stage: see CurriculumConfig.last.
    """

    stages: Mapping[str, Stage] = field(default_factory=dict)
    created: float = 0.0
    plan: tuple[Mapping[str, Any], ...] = ()
    last_stage: str = ""

    def stage(self, name: str) -> Stage:
        """The state of a stage; a fresh one for a stage that was never begun."""
        return self.stages.get(name, Stage())


def fold(events: Iterable[Mapping[str, Any]]) -> History:
    """The state after all events."""
    history = History()
    for event in events:
        history = advance(history, event)
    return history


def advance(history: History, event: Mapping[str, Any]) -> History:
    """The state after one more event; events of other kinds change nothing.

    Raises:
        StageError: the event lacks what dmx writes into its kind.
    """
    kind = events.check(event, events.CURRICULUM)
    if kind == "created":
        return dataclasses.replace(history, created=event["time"])
    if kind == "session" and "stages" in event:
        return dataclasses.replace(
            history, plan=tuple(event["stages"]), last_stage=event.get("last_stage", "")
        )
    if kind == "reset":
        again = event["stages"]
        kept = {
            name: Stage(discarded=(*state.discarded, *state.attempts))
            if name in again
            else _without_tests_on(state, again)
            for name, state in history.stages.items()
        }
        return dataclasses.replace(history, stages=kept)
    if kind == "decided" and event["next"] == "promote" and not event.get("checkpoint"):
        raise events.foreign(kind, "checkpoint")
    if kind not in ("started", "report", "decided", "tested"):
        return history
    name = event["stage"]
    state = _STEPS[kind](history.stage(name), event)
    return dataclasses.replace(history, stages={**history.stages, name: state})


def _without_tests_on(state: Stage, stages: Collection[str]) -> Stage:
    """A stage that is trained again may have another task or other data since."""
    kept = {on: accuracy for on, accuracy in state.tests.items() if on not in stages}
    return dataclasses.replace(state, tests=kept)


def _started(state: Stage, event: Mapping[str, Any]) -> Stage:
    attempt = Attempt(
        number=event["attempt"],
        retry=event["retry"],
        config=event["config"],
        source=event["source"],
        spec=event["spec"],
        data=event["data"],
        started=event["time"],
        attention=event.get("attention", ""),
    )
    return dataclasses.replace(state, attempts=(*state.attempts, attempt))


def _report(state: Stage, event: Mapping[str, Any]) -> Stage:
    def add(attempt: Attempt) -> Attempt:
        curve = {**attempt.curve, event["step"]: event["metrics"]}
        return dataclasses.replace(attempt, curve=curve)

    return _change(state, event, add)


def _decided(state: Stage, event: Mapping[str, Any]) -> Stage:
    return _change(state, event, lambda a: dataclasses.replace(a, decision=event))


def _tested(state: Stage, event: Mapping[str, Any]) -> Stage:
    return dataclasses.replace(state, tests={**state.tests, event["on"]: event["accuracy"]})


def _change(state: Stage, event: Mapping[str, Any], change: Any) -> Stage:
    attempts = tuple(change(a) if a.number == event["attempt"] else a for a in state.attempts)
    return dataclasses.replace(state, attempts=attempts)


_STEPS = {"started": _started, "report": _report, "decided": _decided, "tested": _tested}
