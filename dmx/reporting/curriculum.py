"""Read a curriculum's folder: what its journal folds into, as the controller folds it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx.cli import command_line
from dmx.errors import ConfigError, DataError, StageError
from dmx.reporting.labels import UNKNOWN, attention_label, base_name
from dmx.reporting.records import Attempt, RunReport, Stage, StageSearch, Trial
from dmx.runs import layout
from dmx.runs.curriculum import STAGES_DIR, History, StageState, fold
from dmx.runs.curriculum import Attempt as Try
from dmx.runs.metrics import DEV_ACCURACY
from dmx.runs.study import TrialStatus
from dmx.schema import flatten, read_yaml
from dmx.storage.journal import read_journal, wall_seconds

CURRICULUM_FILE = "curriculum.yaml"
_STATUS = {"promote": "passed", "stop": "failed", "retry": "trying again", "longer": "training on"}
_SEEDS = ("train.seed", "data.seed", "search.seed", "data.root", "train.device", "train.compile")


def is_curriculum(folder: Path) -> bool:
    """Whether a folder holds what only a curriculum leaves."""
    names = (layout.LINEAGE_FILE, CURRICULUM_FILE)
    begun = (folder / layout.JOURNAL_FILE).exists() and (folder / STAGES_DIR).exists()
    return begun or any((folder / name).exists() for name in names)


def read_curriculum(folder: Path) -> RunReport:
    """A curriculum, finished, stopped or running.

    Raises:
        DataError, StageError: its journal is missing or damaged; names it.
    """
    path = folder / layout.JOURNAL_FILE
    events, _ = read_journal(path)
    if not events:
        raise DataError(f"{path} is missing or empty, and nothing else tells how the run went.")
    try:
        history = fold(events)
        stages = _stages(history, folder)
        return _report(folder, history, stages, events)
    except StageError as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged: an event lacks a value ({type(error).__name__}: {error})."
        ) from None


def _report(
    folder: Path, history: History, stages: Sequence[Stage], events: Sequence[Mapping[str, Any]]
) -> RunReport:
    goal = _goal(history, stages)
    by_name = {s.name: s for s in stages}
    chain = [s for s in _chain(goal, by_name) if s.attempts]
    shown = chain[-1] if chain else None
    trials = tuple(_trial(i, s) for i, s in enumerate(stages) if s.attempts)
    return RunReport(
        kind="curriculum",
        name=folder.name,
        folder=folder,
        task=shown.task if shown else (by_name[goal].task if goal in by_name else UNKNOWN),
        attention=_attention([s.attention for s in chain or stages]),
        data=(shown.data if shown else "") or UNKNOWN,
        data_checksum=shown.data_checksum if shown else "",
        is_sample=any(s.data.endswith(", not LRA") for s in stages),
        complete=bool(stages) and all(s.status == "passed" for s in stages),
        config=shown.config if shown else None,
        trials=trials,
        best=next((t.number for t in trials if shown and stages[t.number] is shown), None),
        test_accuracy=shown.test_accuracy if shown else math.nan,
        environment=_environment(history, events),
        seconds=wall_seconds(events),
        train_seconds=math.fsum(
            a.all_seconds for s in history.stages.values() for a in (*s.discarded, *s.attempts)
        ),
        stages=tuple(stages),
        goal=goal,
        shown=shown.name if shown else "",
        recipe=_recipe(history, [s.name for s in stages]),
    )


def _stages(history: History, folder: Path) -> list[Stage]:
    """Those of the file in its order; a stage that the file has no more comes last."""
    plan = [dict(p) for p in history.plan] or _planned(folder / CURRICULUM_FILE)
    named = {p["name"]: p for p in plan}
    for name in history.stages:
        named.setdefault(name, {"name": name})
    goal = history.last_stage or (list(named)[-1] if named else "")
    return [_stage(planned, history.stage(name), goal, folder) for name, planned in named.items()]


def _planned(path: Path) -> list[dict[str, Any]]:
    """The stages in curriculum.yaml, for journals that do not list them."""
    try:
        found = read_yaml(path).get("stages") if path.is_file() else None
    except ConfigError as error:
        raise DataError(f"{path} is damaged: {error}") from None
    stages = [s for s in found or [] if isinstance(s, Mapping) and isinstance(s.get("name"), str)]
    names = {s["name"] for s in stages}
    return [
        {
            "name": s["name"],
            "task": str(s.get("task", s["name"])),
            "attention": attention_label(s),
            "parent": s["init_from"] if s.get("init_from") in names else None,
        }
        for s in stages
    ]


def _goal(history: History, stages: Sequence[Stage]) -> str:
    """The stage that all are measured on."""
    return history.last_stage or (stages[-1].name if stages else "")


def _chain(name: str, stages: Mapping[str, Stage]) -> list[Stage]:
    """The stages that lead to one, and itself."""
    found: list[Stage] = []
    stage = stages.get(name)
    while stage is not None and stage not in found:
        found.insert(0, stage)
        stage = stages.get(stage.parent or "")
    return found


def _attention(labels: Sequence[str]) -> str:
    """`butterfly-64` at the end of one attention's growing sizes; `butterfly, then linear` of two.

    The labels are those of the stages along the chain.
    """
    names = list(dict.fromkeys(base_name(label) for label in labels))
    return ", then ".join(names) if len(names) > 1 else (labels[-1] if labels else UNKNOWN)


def _stage(planned: Mapping[str, Any], state: StageState, goal: str, folder: Path) -> Stage:
    shown, promoted = state.shown, state.promoted
    name, planned_task = str(planned["name"]), str(planned.get("task", planned["name"]))
    if shown is None:
        return Stage(
            name=name,
            task=planned_task,
            attention=str(planned.get("attention", "")),
            status="waiting",
            parent=planned.get("parent"),
        )
    attempts = tuple(_attempt(t) for t in state.attempts)
    own = next(a for a in attempts if a.number == shown.number)
    accuracy = None if promoted is None else promoted.get(DEV_ACCURACY)
    checkpoint = promoted or (shown.decision or {}).get("checkpoint") or {}
    source = state.attempts[0].source
    return Stage(
        name=name,
        task=str(shown.config.get("task", planned_task)),
        attention=attention_label(shown.trained),
        data=str(shown.data.get("label", "")),
        data_checksum=str(shown.data.get("checksum") or ""),
        status=_STATUS.get(str(state.next_step), "running"),
        parent=source.get("stage") or source.get("path") or None,
        steps=own.steps,
        all_steps=sum(a.all_steps for a in attempts),
        seconds=math.fsum(a.seconds for a in attempts if math.isfinite(a.seconds)),
        dev_accuracy=own.best if accuracy is None else float(accuracy),
        test_accuracy=_accuracy(state.tests, name),
        test_on_last=_accuracy(state.tests, goal),
        checkpoint=_place(folder, checkpoint.get("path")),
        start=_place(folder, shown.source.get("path")),
        data_root=str(Path(data).parent) if (data := str(shown.data.get("folder") or "")) else "",
        reinit=tuple(map(str, shown.spec.get("reinit") or ())) if source else (),
        attempts=attempts,
        promoted=None if promoted is None else int(promoted["attempt"]),
        config=shown.trained or None,
    )


def _place(folder: Path, path: object) -> str:
    """A path of the journal's, which names what lies in the run by what follows its folder."""
    return str(folder / str(path)) if path else ""


def _accuracy(tests: Mapping[str, float | None], on: str) -> float:
    """NaN where it was not measured, or where the weights do not fit that stage's model."""
    value = tests.get(on)
    return math.nan if value is None else float(value)


def _attempt(found: Try) -> Attempt:
    decided = found.decision or {}
    search = found.search
    return Attempt(
        number=found.number,
        reports=tuple(found.reports[s] for s in sorted(found.reports)),
        passed=decided.get("passed"),
        reason=str(decided.get("reason", "")),
        steps=found.steps,
        all_steps=found.all_steps,
        seconds=found.all_seconds if found.reports else math.nan,
        search=None
        if search is None
        else StageSearch(
            trial=int(search["trial"]),
            num_trials=int(search["num_trials"]),
            params=dict(search["params"]),
        ),
    )


def _trial(number: int, stage: Stage) -> Trial:
    """The stage's promoted attempt, else its latest, as every kind of run has trials."""
    ends: dict[str, TrialStatus] = {"passed": "COMPLETE", "failed": "FAILED"}
    own = next((a for a in stage.attempts if a.number == stage.promoted), stage.attempts[-1])
    return Trial(number=number, status=ends.get(stage.status, "RUNNING"), reports=own.reports)


def _environment(history: History, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The versions of dmx that trained its stages, and the latest command."""
    shown = (s.shown for s in history.stages.values())
    code = list(dict.fromkeys(str(c) for t in shown if t and (c := t.spec.get("code"))))
    found: dict[str, Any] = {"code": ", then ".join(code)} if code else {}
    for event in reversed(events):
        if event.get("event") == "session" and isinstance(event.get("argv"), list):
            words = [str(word) for word in event["argv"]]
            found["argv"] = [command_line("dmx.curriculum", words)]
            break
    return found


def _recipe(history: History, names: Sequence[str]) -> str:
    """A digest of all that decides the result but for seeds: equal ones are the same experiment."""
    parts = []
    for name in names:
        tried = history.stage(name).attempts
        spec = flatten(dict(tried[0].spec)) if tried else {}
        spec = {k: v for k, v in spec.items() if k not in _SEEDS}
        parts.append([name, spec, tried[0].data.get("checksum") if tried else None])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
