"""Lineage: which checkpoint, config, data and code every stage came from; as JSON and picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx import records as keys
from dmx.curriculum.history import Attempt, History, StageState, attempt_folder
from dmx.curriculum.stages import CurriculumConfig, StageConfig
from dmx.study.files import write_text

PICTURE_FILE = "lineage.md"
_COLOURS = {"passed": "#d5f5d5", "running": "#fff3c4", "failed": "#f8d0d0", "waiting": "#eeeeee"}


class LineageWriter:
    """Keeps lineage.json and lineage.md up to date. `code`: the version that runs now."""

    def __init__(self, curriculum: CurriculumConfig, folder: Path, code: str) -> None:
        self._curriculum, self._folder, self._code = curriculum, folder, code

    def event(self, history: History, event: Mapping[str, Any]) -> None:
        """Write after whatever changes the picture."""
        if event["event"] in ("started", "decided", "tested", "reset"):
            self.write(history)

    def write(self, history: History) -> None:
        """Write both files, each at once."""
        lineage = describe(self._curriculum, history, self._folder, self._code)
        text = json.dumps(lineage, indent=1, ensure_ascii=False) + "\n"
        write_text(self._folder / keys.LINEAGE_FILE, text)
        write_text(self._folder / PICTURE_FILE, picture(lineage))


def describe(
    curriculum: CurriculumConfig, history: History, folder: Path, code: str
) -> dict[str, Any]:
    """The lineage as plain data. Accuracies are 0..1 or null; paths are absolute."""
    last = curriculum.stages[-1].name
    return {
        "name": folder.name,
        "curriculum": curriculum.name,
        "last_stage": last,
        "code": code,
        "stages": [
            _stage(stage, history.stage(stage.name), history, folder, last)
            for stage in curriculum.stages
        ],
    }


def _stage(
    stage: StageConfig, state: StageState, history: History, folder: Path, last: str
) -> dict[str, Any]:
    promoted = state.promoted
    attempt = _attempt(state, promoted)
    decision = {} if state.current is None else (state.current.decision or {})
    checkpoint = None if promoted is None else folder / promoted["path"]
    shown: dict[str, Any] = {
        "name": stage.name,
        "task": stage.task,
        "attention": stage.config.attention.to_plain(),
        "status": state.status,
        "parent": stage.parent,
        "init_from": None,
        keys.DEV_ACCURACY: None if promoted is None else promoted[keys.DEV_ACCURACY],
        keys.TEST_ACCURACY: state.tests.get(stage.name),
        "test_accuracy_on_last_stage": state.tests.get(last),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "sha256": None if promoted is None else promoted["sha256"],
        "config": None if checkpoint is None else str(checkpoint / keys.CONFIG_FILE),
        "step": None if promoted is None else promoted["step"],
        "attempts": len(state.attempts),
        "gate": {"passed": decision.get("passed"), "reason": decision.get("reason")},
    }
    if attempt is not None:
        source = dict(attempt.source)
        if "stage" in source:
            source["path"] = str(folder / source["path"])
        shown["init_from"] = source or None
        shown["attempt"] = attempt.number
        shown["folder"] = str(attempt_folder(folder, stage.name, attempt.number))
        shown["data"] = dict(attempt.data)
        shown["code"] = attempt.spec.get("code")
        shown["seeds"] = {
            "model": attempt.config["train"]["seed"],
            "data": attempt.config["data"]["seed"],
        }
        shown[keys.STEPS] = attempt.steps
        shown[keys.TRAIN_SECONDS] = attempt.last.get(keys.TRAIN_SECONDS)
        shown[keys.PARAMETERS] = attempt.last.get(keys.PARAMETERS)
    return shown


def _attempt(state: StageState, promoted: Mapping[str, Any] | None) -> Attempt | None:
    """The promoted attempt, else the latest."""
    for attempt in state.attempts:
        if promoted is not None and attempt.number == promoted["attempt"]:
            return attempt
    return state.current


def picture(lineage: Mapping[str, Any]) -> str:
    """A Markdown page with a mermaid graph of the stages, and their table."""
    lines = [f"# Lineage of {lineage['name']}", "", "```mermaid", "graph TD"]
    names = {stage["name"]: f"s{number}" for number, stage in enumerate(lineage["stages"])}
    for stage in lineage["stages"]:
        node = names[stage["name"]]
        text = (
            f"<b>{stage['name']}</b><br/>{stage['task']}<br/>dev {_percent(stage['dev_accuracy'])}"
        )
        text += f", test {_percent(stage['test_accuracy'])}"
        lines.append(f'  {node}["{text}"]')
        lines.append(f"  style {node} fill:{_COLOURS[stage['status']]}")
        source = stage["init_from"] or {}
        if stage["parent"] is not None:
            lines.append(f"  {names[stage['parent']]} --> {node}")
        elif "path" in source:
            lines.append(f'  {node}_init(["{source["path"]}"]) --> {node}')
    lines += ["```", ""]
    lines.append(
        f"Code: {lineage['code']}. The last column is the test split of {lineage['last_stage']}."
    )
    lines += ["", "| stage | status | from | data | steps | dev | test | test on last |"]
    lines.append("|---|---|---|---|---:|---:|---:|---:|")
    for stage in lineage["stages"]:
        data = stage.get("data") or {}
        source = stage["init_from"] or {}
        cells = [
            stage["name"],
            stage["status"],
            source.get("stage") or source.get("path") or "-",
            f"{data['label']} `{data['checksum'][:12]}`" if data else "-",
            str(stage.get("step") or "-"),
            *(_percent(stage[k]) for k in ("dev_accuracy", "test_accuracy")),
            _percent(stage["test_accuracy_on_last_stage"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"
