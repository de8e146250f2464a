"""A curriculum: its stages and their attempts, as its controller decides by them and reports show.

It is a run as others are: its trials are its stages, of each the promoted attempt, else the latest.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmx.runs import events
from dmx.runs.layout import DEV_ACCURACY, TEST_ACCURACY, TRAIN_SECONDS, attempt_folder
from dmx.runs.run import UNKNOWN, Run
from dmx.runs.trial import Trained, Trial, TrialStatus, number
from dmx.schema import flatten

_SEEDS = ("train.seed", "data.seed", "search.seed", "data.root", "train.device", "train.compile")
"""What may differ between the seeds of one recipe."""

StageStatus = Literal["waiting", "running", "passed", "failed"]
_STATUS: dict[str, StageStatus] = {"promote": "passed", "stop": "failed"}
_PROGRESS = {**_STATUS, "retry": "trying again", "longer": "training on"}
"""By what the last decision said that follows."""


@dataclass(kw_only=True)
class Attempt(Trained):
    """One try at a stage; of a search, its best trial.

    Attributes:
        number: counts all tries of the stage, those before a `--from-stage` included; its folder.
        retry: counts tries since the stage was last begun: 0, 1, ...; seeds depend on it.
        config: the RunConfig it trains, plain. source: where its weights come from: `path`, and
            `stage` if that is one; {} for fresh ones.
        spec: what the stage said when it was launched (StageConfig.plain).
        attention: its label, or "".
        decision: the event that ended it; {} while it runs.
    """

    retry: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    attention: str = ""
    decision: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dev_accuracies(self) -> tuple[float, ...]:
        """Dev accuracy at every evaluation, in order."""
        return tuple(report[DEV_ACCURACY] for report in self.reports)

    @property
    def num_classes(self) -> int:
        return int(self.config["model"]["num_classes"])

    # -- what its gate said -----------------------------------------------------------------

    @property
    def passed(self) -> bool | None:
        """None while its gate has not decided."""
        return self.decision.get("passed")

    @property
    def reason(self) -> str:
        return str(self.decision.get("reason", ""))

    @property
    def judging(self) -> Mapping[str, Any]:
        """Gate and on_fail by which it was judged, or would be when it was launched."""
        judging: Mapping[str, Any] = self.decision.get("judging") or self.spec
        return {key: judging[key] for key in ("gate", "on_fail")}

    # -- of a search ------------------------------------------------------------------------

    @property
    def search(self) -> Mapping[str, Any] | None:
        """What a search found and cost (see events); None of a run, or before its end."""
        return self.decision.get("search")

    @property
    def trained(self) -> Mapping[str, Any]:
        """The plain RunConfig of its checkpoints: of a search, its best trial's."""
        config: Mapping[str, Any] = (self.search or {}).get("config", self.config)
        return config

    @property
    def label(self) -> str:
        """Its attention; of a search, its best trial's."""
        return str((self.search or {}).get("attention") or self.attention)

    @property
    def all_steps(self) -> int:
        """Optimizer steps of all that was trained in it."""
        return self.steps if self.search is None else int(self.search["steps"])

    @property
    def all_seconds(self) -> float:
        """Training time of all that was trained in it."""
        return self.seconds if self.search is None else float(self.search[TRAIN_SECONDS])


@dataclass(kw_only=True)
class Stage:
    """One stage. Accuracies lie in 0..1, NaN where unknown.

    Attributes:
        folder: the curriculum's. planned: the stage as the curriculum's file has it; {} where that
            has it no more. goal: the curriculum's last stage.
        attempts: since the stage was last begun. discarded: those before (--from-stage).
        tests: test accuracy by the name of the stage whose test split it was; None where the
            weights do not fit that stage's model.
    """

    name: str
    folder: Path
    planned: Mapping[str, Any] = field(default_factory=dict)
    goal: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    discarded: list[Attempt] = field(default_factory=list)
    tests: dict[str, float | None] = field(default_factory=dict)

    @property
    def next_number(self) -> int:
        """The next attempt's; numbers are never used twice."""
        return max((a.number for a in (*self.discarded, *self.attempts)), default=-1) + 1

    @property
    def current(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def _next(self) -> str:
        return "" if self.current is None else str(self.current.decision.get("next", ""))

    @property
    def status(self) -> StageStatus:
        return "waiting" if self.current is None else _STATUS.get(self._next, "running")

    @property
    def progress(self) -> str:
        """Its status in words: a running stage may be `trying again` or `training on`."""
        return _PROGRESS.get(self._next, self.status)

    @property
    def promoted(self) -> Mapping[str, Any] | None:
        """The promoted checkpoint (see events), which the next stage gets."""
        if self.current is None or self._next != "promote":
            return None
        checkpoint: Mapping[str, Any] = self.current.decision["checkpoint"]
        return checkpoint

    @property
    def promoted_attempt(self) -> int | None:
        return None if self.promoted is None else int(self.promoted["attempt"])

    @property
    def shown(self) -> Attempt | None:
        """The promoted attempt, else the latest."""
        promoted = [a for a in self.attempts if a.number == self.promoted_attempt]
        return promoted[0] if promoted else self.current

    @property
    def _shown(self) -> Attempt:
        return self.shown or Attempt(number=-1)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The plain RunConfig of its checkpoint, or None."""
        return self._shown.trained or None

    @property
    def task(self) -> str:
        return str(self._shown.config.get("task") or self.planned.get("task", self.name))

    @property
    def attention(self) -> str:
        """With its size; of a search, its best trial's."""
        return self._shown.label or str(self.planned.get("attention", ""))

    @property
    def source(self) -> Mapping[str, Any]:
        """Where its first attempt's weights came from (see Attempt)."""
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
        return tuple(map(str, self._shown.spec.get("reinit") or ())) if self.source else ()

    @property
    def data(self) -> str:
        return str(self._shown.data.get("label") or "")

    @property
    def data_checksum(self) -> str:
        return str(self._shown.data.get("checksum") or "")

    @property
    def data_root(self) -> str:
        """The folder of all data, or ""."""
        found = self._shown.data.get("folder")
        return str(Path(found).parent) if found else ""

    @property
    def steps(self) -> int:
        """Optimizer steps of the promoted attempt, else of the latest."""
        return self._shown.steps

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
        return promoted if math.isfinite(promoted) else self._shown.best

    @property
    def test_accuracy(self) -> float:
        return number(self.tests, self.name)

    @property
    def test_on_last(self) -> float:
        """On the test split of the curriculum's last stage."""
        return number(self.tests, self.goal)

    @property
    def checkpoint(self) -> str:
        """The folder of the promoted checkpoint, else of the one last judged, or ""."""
        judged = self._shown.decision.get("checkpoint")
        return self._place((self.promoted or judged or {}).get("path"))

    @property
    def start(self) -> str:
        """The folder of the weights that its training started from, or ""."""
        return self._place(self._shown.source.get("path"))

    def _place(self, path: object) -> str:
        """A path of the journal's, which names what lies in the run by what follows its folder."""
        return str(self.folder / str(path)) if path else ""


class Curriculum(Run):
    """A curriculum, finished, stopped or running; the fold that its controller decides by.

    Attributes:
        created: time of the first session, or 0. goal: the last stage, which all are measured on.
        at_work: the session that has not said that it stopped, or None.
    """

    kind = "curriculum"
    known_events = events.CURRICULUM

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.created = 0.0
        self._cut_off: list[Mapping[str, Any]] = []
        self.at_work: Mapping[str, Any] | None = None
        self._stages: dict[str, Stage] = {}
        self._argv: list[str] = []

    def cut_off(self, **options: Any) -> bool:
        """Whether a session was begun with the options, and none has come to its end since."""
        return any(all(s.get(k) == v for k, v in options.items()) for s in self._cut_off)

    def stage(self, name: str) -> Stage:
        """A stage; a fresh one where it was never begun."""
        return self._stages.get(name) or Stage(name=name, folder=self.folder)

    @property
    def stages(self) -> tuple[Stage, ...]:  # type: ignore[override]
        """Those of the file in its order; a stage that the file has no more comes last."""
        return tuple(self._stages.values())

    def _fold(self, name: str, event: Mapping[str, Any]) -> None:
        if name == "session":
            self.created = self.created or event["time"]
            self._cut_off.append(event)
            self.at_work = event
            self._argv = event.get("argv", self._argv)
            self._plan(event.get("stages", []), event.get("last_stage", ""))
        elif name in ("closed", "interrupted"):
            self.at_work = None
            self._cut_off = [] if name == "closed" else self._cut_off
        elif name == "reset":
            self._reset(event["stages"])
        elif name in ("started", "report", "decided", "tested"):
            stage = self._stages.setdefault(event["stage"], self.stage(event["stage"]))
            self._fold_stage(stage, name, event)

    def _plan(self, planned: Sequence[Mapping[str, Any]], last: str) -> None:
        """The stages are those of the file from now on, and what was begun before."""
        plans = {plan["name"]: plan for plan in planned}
        names = [*plans, *(name for name in self._stages if name not in plans)]
        self._stages = {name: self.stage(name) for name in names}
        self.goal = last or (names or [""])[-1]
        for name, stage in self._stages.items():
            stage.planned, stage.goal = plans.get(name, {}), self.goal

    def _reset(self, again: Collection[str]) -> None:
        for stage in self._stages.values():
            if stage.name in again:
                stage.discarded += stage.attempts
                stage.attempts, stage.tests = [], {}
            # One that is trained again may have another task or other data since.
            stage.tests = {on: found for on, found in stage.tests.items() if on not in again}

    def _fold_stage(self, stage: Stage, name: str, event: Mapping[str, Any]) -> None:
        if name == "tested":
            stage.tests[event["on"]] = event["accuracy"]
        elif name == "started":
            attempt = Attempt(
                number=event["attempt"],
                folder=attempt_folder(self.folder, stage.name, event["attempt"]),
                attention=event.get("attention", ""),
                **{key: event[key] for key in ("retry", "config", "source", "spec", "data")},
            )
            stage.attempts.append(attempt)
        for attempt in stage.attempts:
            if attempt.number != event.get("attempt"):
                continue
            if name == "report":
                attempt.curve[event["step"]] = event["metrics"]
            elif name == "decided":
                if event["next"] == "promote" and not event.get("checkpoint"):
                    raise events.foreign(name, "checkpoint")
                attempt.decision = event

    # -- as a run ---------------------------------------------------------------------------

    @property
    def _chain(self) -> list[Stage]:
        """The stages that lead to the last one, and itself."""
        found: list[Stage] = []
        stage = self._stages.get(self.goal)
        while stage is not None and stage not in found:
            found.insert(0, stage)
            stage = self._stages.get(stage.parent or "")
        return found

    @property
    def shown_stage(self) -> Stage | None:  # type: ignore[override]
        """The last stage on the way to the goal that was begun: config and accuracies are its."""
        return next((s for s in reversed(self._chain) if s.attempts), None)

    @property
    def _shown(self) -> Stage:
        return self.shown_stage or self.stage("")

    @property
    def shown(self) -> str:  # type: ignore[override]
        return self._shown.name

    @property
    def task(self) -> str:
        """Of the shown stage; before any was begun, of the last."""
        stages = [self.shown_stage] if self.shown_stage else self._chain
        return stages[-1].task if stages else UNKNOWN

    @property
    def attention(self) -> str:
        """`butterfly-64` at the end of one attention's growing sizes; `butterfly, then linear`."""
        labels = [s.attention for s in self._chain if s.attempts]
        labels = labels or [s.attention for s in self.stages]
        names = list(dict.fromkeys(events.base_name(label) for label in labels))
        return ", then ".join(names) if len(names) > 1 else (labels[-1] if labels else UNKNOWN)

    @property
    def data(self) -> str:
        return self._shown.data or UNKNOWN

    @property
    def data_checksum(self) -> str:
        return self._shown.data_checksum

    @property
    def is_sample(self) -> bool:
        """Whether a stage's data stand in for the published ones."""
        return any(self.stands_in(s.data) for s in self.stages)

    @property
    def complete(self) -> bool:
        return bool(self.stages) and all(s.status == "passed" for s in self.stages)

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self._shown.config

    @property
    def init(self) -> Mapping[str, Any]:
        """The weights on disk that the first stage on the way to the goal started from, or {}."""
        first = next(iter(self._chain), self._shown)
        on_disk = "path" in first.source and "stage" not in first.source
        return {**first.source, "reinit": list(first.reinit)} if on_disk else {}

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Of each stage that was begun the promoted attempt, else the latest."""
        ends: dict[str, TrialStatus] = {"passed": "COMPLETE", "failed": "FAILED"}
        return tuple(
            Trial(
                number=place,
                status=ends.get(stage.status, "RUNNING"),
                curve=dict(stage.shown.curve),
                folder=stage.shown.folder,
            )
            for place, stage in enumerate(self.stages)
            if stage.shown is not None
        )

    @property
    def best_trial(self) -> Trial | None:
        return next((t for t in self.trials if self.stages[t.number] is self._shown), None)

    @property
    def best_step(self) -> int | None:
        return (self._shown.promoted or {}).get("step")

    @property
    def _tested(self) -> Mapping[str, Any]:
        return {TEST_ACCURACY: self._shown.test_accuracy}

    @property
    def train_seconds(self) -> float:  # type: ignore[override]
        """Of all that was trained, side by side or not, discarded attempts included."""
        return math.fsum(a.all_seconds for s in self.stages for a in (*s.discarded, *s.attempts))

    @property
    def checkpoint(self) -> Path:
        return Path(self._shown.checkpoint or super().checkpoint)

    @property
    def environment(self) -> Mapping[str, Any]:
        """The versions of dmx that trained its stages; `argv` of the latest session."""
        shown = [s.shown for s in self.stages if s.shown is not None]
        code = list(dict.fromkeys(str(a.spec["code"]) for a in shown if a.spec.get("code")))
        found: dict[str, Any] = {"code": ", then ".join(code)} if code else {}
        if self._argv:
            found["argv"] = [f"python -m dmx.curriculum {shlex.join(self._argv)}"]
        return found

    @property
    def recipe(self) -> str:  # type: ignore[override]
        """A digest of all that decides the result but seeds: equal ones are one experiment."""
        parts = []
        for stage in self.stages:
            first = stage.attempts[0] if stage.attempts else None
            spec = flatten(dict(first.spec)) if first else {}
            kept = {k: v for k, v in spec.items() if k not in _SEEDS}
            parts.append([stage.name, kept, first.data.get("checksum") if first else None])
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
