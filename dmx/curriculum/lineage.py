"""Lineage: which checkpoint, config, data and code every stage came from; as JSON and picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx import records as keys
from dmx.attention.base import AttentionConfig
from dmx.curriculum.history import History, StageState, attempt_folder
from dmx.curriculum.stages import CurriculumConfig, StageConfig
from dmx.storage.files import write_atomic

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
        write_atomic(self._folder / keys.LINEAGE_FILE, text)
        write_atomic(self._folder / PICTURE_FILE, picture(lineage))


def describe(
    curriculum: CurriculumConfig, history: History, folder: Path, code: str
) -> dict[str, Any]:
    """The lineage as plain data. Accuracies are 0..1 or null; paths are absolute."""
    last = curriculum.last.name
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
    promoted, attempt = state.promoted, state.shown
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
            "model": attempt.trained["train"]["seed"],
            "data": attempt.trained["data"]["seed"],
        }
        shown[keys.STEPS] = attempt.steps
        shown[keys.TRAIN_SECONDS] = attempt.last.get(keys.TRAIN_SECONDS)
        shown["all_attempts"] = {
            keys.STEPS: sum(a.all_steps for a in state.attempts),
            keys.TRAIN_SECONDS: math.fsum(a.all_seconds for a in state.attempts),
        }
        if attempt.search is not None:
            shown["attention"] = dict(attempt.trained["attention"])
            shown["search"] = {k: attempt.search[k] for k in ("trial", "num_trials", "params")}
        shown[keys.PARAMETERS] = attempt.last.get(keys.PARAMETERS)
    return shown


def picture(lineage: Mapping[str, Any]) -> str:
    """A Markdown page with a mermaid graph of the stages, and their table."""
    lines = [f"# Lineage of {lineage['name']}", "", "```mermaid", "graph TD"]
    names = {stage["name"]: f"s{number}" for number, stage in enumerate(lineage["stages"])}
    for stage in lineage["stages"]:
        node = names[stage["name"]]
        text = (
            f"<b>{stage['name']}</b><br/>{stage['task']}<br/>{_attention(stage)}"
            f"<br/>dev {_percent(stage['dev_accuracy'])}"
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
    lines.append(f"Code: {lineage['code']}.")
    last = lineage["last_stage"]
    lines += ["", f"| stage | status | from | attention | data | step | dev | test | on {last} |"]
    lines.append("|---|---|---|---|---|---:|---:|---:|---:|")
    for stage in lineage["stages"]:
        data = stage.get("data") or {}
        source = stage["init_from"] or {}
        cells = [
            stage["name"],
            stage["status"],
            source.get("stage") or source.get("path") or "-",
            _attention(stage),
            f"{data['label']} `{data['checksum'][:12]}`" if data else "-",
            str(stage.get("step") or "-"),
            *(_percent(stage[k]) for k in ("dev_accuracy", "test_accuracy")),
            _percent(stage["test_accuracy_on_last_stage"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _attention(stage: Mapping[str, Any]) -> str:
    """`butterfly-64`, and which trial of how many chose it."""
    label = AttentionConfig.parse(stage["attention"], "attention").label
    found = stage.get("search")
    return label + (f" (trial {found['trial']} of {found['num_trials']})" if found else "")


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"
