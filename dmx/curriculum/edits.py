"""Refuses to continue a run whose file was edited since; says what changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dmx.curriculum.history import Attempt, History
from dmx.curriculum.stages import CurriculumConfig
from dmx.errors import StageError
from dmx.overrides import flatten


def check_unchanged(curriculum: CurriculumConfig, history: History) -> None:
    """Refuse to continue a run whose file says something else than what was trained.

    A gate may change while its decision is still open, or was a refusal.

    Raises:
        StageError: with every difference, and the remedy.
    """
    names = {s.name for s in curriculum.stages}
    for name, state in history.stages.items():
        if not state.attempts:
            continue
        if name not in names:
            raise StageError(
                f"stage {name} was trained in this run but is not in the file any more; put it "
                "back, or start another run with --name."
            )
        stage = curriculum.stage(name)
        changed = _differences(state.attempts[0].spec, stage.training(), _NOT_TRAINING)
        if state.status == "passed":
            changed += _differences(judging_of(state.attempts[-1]), stage.judging(), ())
        if changed:
            done = "finished" if state.status == "passed" else "begun"
            raise StageError(
                f"stage {name} was edited after it was {done} ({'; '.join(changed)}); undo that, "
                f"or train it and what follows again with --from-stage {name}."
            )


_NOT_TRAINING = ("name", "gate", "on_fail", "code")


def judging_of(attempt: Attempt) -> Mapping[str, Any]:
    """Gate and on_fail by which the attempt was judged, or would be when it was launched."""
    if attempt.decision is not None:
        judging = attempt.decision["judging"]
        assert isinstance(judging, Mapping)
        return judging
    return {key: attempt.spec[key] for key in ("gate", "on_fail")}


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str]
) -> list[str]:
    before = flatten({k: v for k, v in old.items() if k not in ignored})
    after = flatten({k: v for k, v in new.items() if k not in ignored})
    keys = [*before, *(k for k in after if k not in before)]
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]
