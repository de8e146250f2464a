"""A curriculum: its stages as a run that reports and leaderboards compare with others."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.runs import events
from dmx.runs.layout import attempt_folder
from dmx.runs.run import UNKNOWN, Run
from dmx.runs.stages import History, Stage, advance
from dmx.runs.trial import Trial, TrialStatus
from dmx.schema import flatten

_SEEDS = ("train.seed", "data.seed", "search.seed", "data.root", "train.device", "train.compile")
"""What may differ between the seeds of one recipe."""


class Curriculum(Run):
    """A curriculum, finished, stopped or running; `state` is what its controller decides by.

    Its trials are its stages: of each the promoted attempt, else the latest, by the stage's place.
    """

    kind = "curriculum"
    known_events = events.CURRICULUM

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.state = History()
        self._argv: list[str] = []

    def _fold(self, name: str, event: Mapping[str, Any]) -> None:
        self.state = advance(self.state, event)
        if name == "session":
            self._argv = event.get("argv", self._argv)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:  # type: ignore[override]
        """Those of the file in its order; a stage that the file has no more comes last."""
        plan = {stage["name"]: stage for stage in self.state.plan}
        names = list(dict.fromkeys((*plan, *self.state.stages)))
        goal = self.state.last_stage or (names or [""])[-1]
        return tuple(
            dataclasses.replace(
                self.state.stage(name),
                name=name,
                planned=plan.get(name, {}),
                goal=goal,
                folder=self.folder,
            )
            for name in names
        )

    @property
    def goal(self) -> str:  # type: ignore[override]
        """The last stage, which all are measured on."""
        return self.state.last_stage or (self.stages[-1].name if self.stages else "")

    @functools.cached_property
    def _chain(self) -> list[Stage]:
        """The stages that lead to the last one, and itself."""
        by_name = {s.name: s for s in self.stages}
        found: list[Stage] = []
        stage = by_name.get(self.goal)
        while stage is not None and stage not in found:
            found.insert(0, stage)
            stage = by_name.get(stage.parent or "")
        return found

    @property
    def shown_stage(self) -> Stage | None:  # type: ignore[override]
        """The last stage on the way to the goal that was begun: config and accuracies are its."""
        return next((s for s in reversed(self._chain) if s.attempts), None)

    @property
    def shown(self) -> str:  # type: ignore[override]
        """The name of that stage, or ""."""
        return "" if self.shown_stage is None else self.shown_stage.name

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
        """Of the shown stage."""
        return (self.shown_stage.data if self.shown_stage else "") or UNKNOWN

    @property
    def data_checksum(self) -> str:
        """Of the shown stage."""
        return self.shown_stage.data_checksum if self.shown_stage else ""

    @property
    def is_sample(self) -> bool:
        """Whether a stage's data stand in for the published ones."""
        return any(self.stands_in(s.data) for s in self.stages)

    @property
    def complete(self) -> bool:
        """Whether all stages have passed."""
        return bool(self.stages) and all(s.status == "passed" for s in self.stages)

    @property
    def config(self) -> Mapping[str, Any] | None:
        """Of the shown stage's checkpoint."""
        return self.shown_stage.config if self.shown_stage else None

    @property
    def init(self) -> Mapping[str, Any]:
        """The weights on disk that the first stage on the way to the goal started from, or {}."""
        first = self._chain[0] if self._chain else Stage()
        if "stage" in first.source or "path" not in first.source:
            return {}
        return {**first.source, "reinit": list(first.reinit)}

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Of each stage that was begun the promoted attempt, else the latest."""
        ends: dict[str, TrialStatus] = {"passed": "COMPLETE", "failed": "FAILED"}
        return tuple(
            Trial(
                number=place,
                status=ends.get(stage.status, "RUNNING"),
                curve=dict(stage.shown.curve),
                folder=attempt_folder(self.folder, stage.name, stage.shown.number),
            )
            for place, stage in enumerate(self.stages)
            if stage.shown is not None
        )

    @property
    def best_trial(self) -> Trial | None:
        """The shown stage's."""
        shown = self.shown_stage
        return next((t for t in self.trials if self.stages[t.number] is shown), None)

    @property
    def best_step(self) -> int | None:
        """The step of the shown stage's promoted checkpoint, or None."""
        promoted = self.shown_stage.promoted if self.shown_stage else None
        return None if promoted is None else promoted.get("step")

    @property
    def test_accuracy(self) -> float:
        """Of the shown stage on its own test split."""
        return self.shown_stage.test_accuracy if self.shown_stage else math.nan

    @property
    def test_loss(self) -> float:
        """Not measured."""
        return math.nan

    @property
    def train_seconds(self) -> float:  # type: ignore[override]
        """Of all that was trained, side by side or not, discarded attempts included."""
        return math.fsum(
            a.all_seconds for s in self.state.stages.values() for a in (*s.discarded, *s.attempts)
        )

    @property
    def checkpoint(self) -> Path:
        """The folder of the shown stage's checkpoint, or one that does not exist."""
        found = self.shown_stage.checkpoint if self.shown_stage else ""
        return Path(found) if found else super().checkpoint

    @property
    def environment(self) -> Mapping[str, Any]:
        """The versions of dmx that trained its stages; `argv` of the latest session."""
        shown = (s.shown for s in self.stages)
        code = list(dict.fromkeys(str(c) for a in shown if a and (c := a.spec.get("code"))))
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
            spec = {} if first is None else flatten(dict(first.spec))
            spec = {k: v for k, v in spec.items() if k not in _SEEDS}
            parts.append([stage.name, spec, None if first is None else first.data.get("checksum")])
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
