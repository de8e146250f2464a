"""What a curriculum shows: log lines, TensorBoard, the table of stages, the lineage."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dmx import terminal
from dmx.attention.base import AttentionConfig
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.curriculum.planner import attempt_config
from dmx.errors import StageError
from dmx.format import duration
from dmx.runs import layout
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    BEST_STEP,
    DEV_ACCURACY,
    DEV_LOSS,
    LEARNING_RATE,
    PARAMETERS,
    SAMPLES_PER_SECOND,
    STEP_SECONDS,
    STEPS,
    TEST_ACCURACY,
    TRAIN_ACCURACY,
    TRAIN_LOSS,
    TRAIN_SECONDS,
    attempt_folder,
)
from dmx.runs.stages import History, Stage, advance, fold
from dmx.storage.files import write_atomic
from dmx.storage.journal import read_journal
from dmx.tensorboard import RunWriter
from dmx.terminal import Column, FittingTable
from dmx.training.samples import write_samples

logger = logging.getLogger("dmx.curriculum")
TENSORBOARD_DIR = "tensorboard"
STAGE_NUMBER = "stage_number"
_STAGES = "stages/"
_TEST_ON_LAST = "test_accuracy_on_last_stage"
_CURVE_KEYS = (
    *(DEV_ACCURACY, DEV_LOSS, TRAIN_LOSS, TRAIN_ACCURACY),
    *(LEARNING_RATE, SAMPLES_PER_SECOND),
)


def log_report(history: History, event: Mapping[str, Any]) -> None:
    """One log line per evaluation, with the time that is left for the stage."""
    attempt = history.stage(event.get("stage", "")).current
    if event["event"] != "report" or attempt is None:
        return
    metrics, total = event["metrics"], int(attempt.config["train"]["num_steps"])
    left = duration(metrics[STEP_SECONDS] * (total - event["step"]))
    with terminal.log_context(event["stage"]):
        logger.info(
            "step %s of %s: train loss %.4f, dev accuracy %.4f (best %.4f), about %s left",
            f"{event['step']:,}",
            f"{total:,}",
            metrics[TRAIN_LOSS],
            metrics[DEV_ACCURACY],
            metrics[BEST_DEV_ACCURACY],
            left,
        )


class TensorBoardView:
    """One run per attempt, and `curriculum`: the chain to the last stage over global steps.

    A tree has one such curve per leaf. Global steps count everything trained along the chain,
    attempts that did not pass included. At the start of a session all files are written afresh
    from the journal, so they never miss a point or show one twice.
    """

    def __init__(
        self, curriculum: CurriculumConfig, folder: Path, events: Iterable[Mapping[str, Any]]
    ) -> None:
        self._curriculum = curriculum
        self._folder = folder / TENSORBOARD_DIR
        self._writers: dict[str, RunWriter] = {}
        for old in self._folder.rglob("events.*") if self._folder.exists() else ():
            old.unlink(missing_ok=True)
        events = list(events)
        final, history = fold(events), History()
        for event in events:
            history = advance(history, event)
            state = final.stage(event.get("stage", ""))
            if event.get("attempt") in [a.number for a in state.attempts]:
                self.event(history, event)  # attempts before a --from-stage are left out
            elif event["event"] == "tested" and event["on"] in state.tests:
                self.event(history, event)

    def event(self, history: History, event: Mapping[str, Any]) -> None:
        """Add what the event brings."""
        kind = event["event"]
        if kind == "started":
            self._started(history, event)
        elif kind == "report":
            self._reported(history, event)
        elif kind == "tested":
            self._tested(history, event)
        elif kind == "decided":
            name = self._run_name(event["stage"], event["attempt"])
            writer = self._writers.pop(name, None)
            if writer is not None:
                writer.end("COMPLETE" if event["failure"] is None else "FAILED")

    def _started(self, history: History, event: Mapping[str, Any]) -> None:
        config, stage = event["config"], event["stage"]
        shown = {"task": config["task"], "attention": config["attention"]["name"]}
        if isinstance(label := event["data"].get("label"), str):
            shown["data"] = label
        name = self._run_name(stage, event["attempt"])
        row = f"{self._folder.parent.name}/{name.removeprefix(_STAGES)}"
        self._writer(name).start({**shown, "stage": stage}, row)
        again = f", attempt {event['attempt']}" if event["attempt"] else ""
        for writer, number, step in self._curves(history, stage):
            title = f"**stage {number}: {stage}**{again}, task {config['task']}"
            writer.text("stage", f"{title}, from global step {step}", step)
            if number > 1 or step:
                writer.scalars({STAGE_NUMBER: number}, step)

    def _reported(self, history: History, event: Mapping[str, Any]) -> None:
        metrics, step = event["metrics"], event["step"]
        own = self._writer(self._run_name(event["stage"], event["attempt"]))
        own.scalars(metrics, step)
        if metrics.get(BEST_STEP) == step:  # of older ones only the last is still on disk
            attempt = attempt_folder(self._folder.parent, event["stage"], event["attempt"])
            write_samples(own, attempt / layout.BEST_DIR, step)
        shown = {k: metrics[k] for k in _CURVE_KEYS if k in metrics}
        for writer, number, before in self._curves(history, event["stage"]):
            writer.scalars({**shown, STAGE_NUMBER: number}, before + step)

    def _tested(self, history: History, event: Mapping[str, Any]) -> None:
        stage, accuracy = event["stage"], event["accuracy"]
        attempt = history.stage(stage).current
        if attempt is None or accuracy is None:
            return
        shown = {TEST_ACCURACY if event["on"] == stage else _TEST_ON_LAST: accuracy}
        if stage == self._curriculum.last.name:
            shown[_TEST_ON_LAST] = accuracy
        for writer, _, before in self._curves(history, stage):
            writer.scalars(shown, before + attempt.steps)

    def _curves(self, history: History, stage: str) -> Iterator[tuple[RunWriter, int, int]]:
        """Of every curve that the stage is part of: its file, and where on it the stage lies.

        That is the stage's number, from 1, and the steps before its latest attempt.
        """
        last = self._curriculum.last.name
        for leaf in sorted(self._curriculum.leaves):
            names = [s.name for s in self._curriculum.chain(leaf)]
            if stage in names:
                number = names.index(stage)
                before = [a for n in names[:number] for a in history.stage(n).attempts]
                before += history.stage(stage).attempts[:-1]
                curve = "curriculum" if leaf == last else f"curriculum-{leaf}"
                yield self._writer(curve), number + 1, sum(a.steps for a in before)

    @staticmethod
    def _run_name(stage: str, attempt: int) -> str:
        return f"{_STAGES}{stage}" + (f"-attempt-{attempt}" if attempt else "")

    def _writer(self, name: str) -> RunWriter:
        if name not in self._writers:
            self._writers[name] = RunWriter(self._folder / name)
        return self._writers[name]

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def stages_table(curriculum: CurriculumConfig, history: History, title: str) -> FittingTable:
    """Where every stage stands."""
    spare = {"to go": 1, "try": 2, "trained for": 3}
    names = ("try", "steps", "dev acc", "test acc", "on last", "trained for", "to go")
    table = FittingTable(
        title,
        (
            Column("stage", fold=True),
            Column("task", fold=True, spare=4),
            Column("state"),
            *(Column(name, right=True, spare=spare.get(name, 0)) for name in names),
        ),
    )
    last = curriculum.last.name
    for stage in curriculum.stages:
        state = history.stage(stage.name)
        table.add_row(
            stage.name,
            stage.task if stage.task != stage.name else "same",
            *_cells(stage, state, last),
        )
    return table


def _cells(stage: StageConfig, state: Stage, last: str) -> list[str]:
    attempt = state.current
    if attempt is None:
        return [state.status, "", f"0/{stage.config.train.num_steps:,}", *("" for _ in range(5))]
    total = attempt_config(stage, attempt.retry).train.num_steps
    best = attempt.last.get(BEST_DEV_ACCURACY)
    if state.promoted is not None:
        best = state.promoted[DEV_ACCURACY]
    left = attempt.last.get(STEP_SECONDS, 0.0) * (total - attempt.steps)
    word: str = state.status
    if attempt.decision is not None and not attempt.decision["passed"]:
        word += " (gate said no)"
    return [
        word,
        str(attempt.retry + 1),
        f"{attempt.steps:,}/{total:,}",
        *(_accuracy(v) for v in (best, state.tests.get(stage.name), state.tests.get(last))),
        duration(sum(a.all_seconds for a in state.attempts)),
        duration(left) if state.status == "running" and attempt.reports else "",
    ]


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def show_status(curriculum: CurriculumConfig, folder: Path) -> None:
    """Print where a run stands; reads the journal only, so that it disturbs no session.

    Raises:
        StageError: there is no run, or its journal is damaged.
    """
    events, _ = read_journal(folder / layout.JOURNAL_FILE)
    if not events:
        raise StageError(f"there is no run in {folder}; start it without --status.")
    history = fold(events)
    title = (
        f"{folder.name}: begun {duration(time.time() - history.created)} ago, {_liveness(events)}"
    )
    terminal.console().print(stages_table(curriculum, history, title))


def _liveness(events: list[dict[str, Any]]) -> str:
    """Whether a controller is at work, as far as this machine can tell."""
    session: dict[str, Any] = {}
    for event in events:
        if event["event"] == "session":
            session = event
        elif event["event"] in ("closed", "interrupted"):
            session = {}
    seen = f"last event {duration(time.time() - events[-1]['time'])} ago"
    if not session:
        return f"not running, {seen}"
    if session["host"] != socket.gethostname():
        return f"running on {session['host']}, {seen}"
    try:
        os.kill(session["pid"], 0)
    except ProcessLookupError:
        return f"stopped without a word (killed?), {seen}; the same command continues it"
    except PermissionError:
        pass
    return f"running (process {session['pid']}), {seen}"


def show_end(curriculum: CurriculumConfig, folder: Path, history: History) -> None:
    """Print where a session has left the stages, and where everything lies."""
    title = f"{folder.name}: {curriculum.name}"
    terminal.console().print(stages_table(curriculum, history, title))
    terminal.verbatim(f"files: {folder}  (lineage.json, lineage.md, journal.jsonl, stages/)")
    terminal.verbatim(f"curves: tensorboard --logdir {folder}")


def log_failures(curriculum: CurriculumConfig, history: History, broken: Mapping[str, str]) -> None:
    """Say of each stage that did not pass why. `broken`: see session.Outcome."""
    for name, reason in broken.items():
        logger.error("stage %s could not run: %s", name, reason)
    for stage in curriculum.stages:
        state = history.stage(stage.name)
        if state.status == "failed" and state.current is not None and state.current.decision:
            logger.error(
                "stage %s was not promoted: %s. Edit its gate or on_fail and run the same command, "
                "or train it again with --from-stage %s.",
                stage.name,
                state.current.decision["reason"],
                stage.name,
            )


PICTURE_FILE = "lineage.md"
_COLOURS = {"passed": "#d5f5d5", "running": "#fff3c4", "failed": "#f8d0d0", "waiting": "#eeeeee"}


class LineageWriter:
    """Keeps lineage.json and lineage.md up to date. `code`: the version that runs now."""

    def __init__(self, curriculum: CurriculumConfig, folder: Path, code: str) -> None:
        self._curriculum, self._folder, self.code = curriculum, folder, code

    def event(self, history: History, event: Mapping[str, Any]) -> None:
        """Write after whatever changes the picture."""
        if event["event"] in ("started", "decided", "tested", "reset"):
            self.write(history)

    def write(self, history: History) -> None:
        """Write both files, each at once."""
        lineage = describe(self._curriculum, history, self._folder, self.code)
        text = json.dumps(lineage, indent=1, ensure_ascii=False) + "\n"
        write_atomic(self._folder / layout.LINEAGE_FILE, text)
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
            _stage(stage, history.stage(stage.name), folder, last) for stage in curriculum.stages
        ],
    }


def _stage(stage: StageConfig, state: Stage, folder: Path, last: str) -> dict[str, Any]:
    promoted, attempt = state.promoted or {}, state.shown
    decision = (state.current.decision if state.current is not None else None) or {}
    checkpoint = folder / promoted["path"] if promoted else None
    shown: dict[str, Any] = {
        "name": stage.name,
        "task": stage.task,
        "attention": stage.config.attention.to_plain(),
        "status": state.status,
        "parent": stage.parent,
        "init_from": None,
        DEV_ACCURACY: promoted.get(DEV_ACCURACY),
        TEST_ACCURACY: state.tests.get(stage.name),
        _TEST_ON_LAST: state.tests.get(last),
        "checkpoint": checkpoint and str(checkpoint),
        "sha256": promoted.get("sha256"),
        "config": checkpoint and str(checkpoint / layout.CONFIG_FILE),
        "step": promoted.get("step"),
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
        shown[STEPS] = attempt.steps
        shown[TRAIN_SECONDS] = attempt.last.get(TRAIN_SECONDS)
        shown["all_attempts"] = {
            STEPS: sum(a.all_steps for a in state.attempts),
            TRAIN_SECONDS: math.fsum(a.all_seconds for a in state.attempts),
        }
        if attempt.search is not None:
            shown["attention"] = dict(attempt.trained["attention"])
            shown["search"] = {k: attempt.search[k] for k in ("trial", "num_trials", "params")}
        shown[PARAMETERS] = attempt.last.get(PARAMETERS)
    return shown


def picture(lineage: Mapping[str, Any]) -> str:
    """A Markdown page with a mermaid graph of the stages, and their table."""
    lines = [f"# Lineage of {lineage['name']}", "", "```mermaid", "graph TD"]
    names = {stage["name"]: f"s{number}" for number, stage in enumerate(lineage["stages"])}
    for stage in lineage["stages"]:
        node = names[stage["name"]]
        text = (
            f"<b>{stage['name']}</b><br/>{stage['task']}<br/>{_attention(stage)}"
            f"<br/>dev {_percent(stage['dev_accuracy'])}, test {_percent(stage['test_accuracy'])}"
        )
        lines.append(f'  {node}["{text}"]')
        lines.append(f"  style {node} fill:{_COLOURS[stage['status']]}")
        source = stage["init_from"] or {}
        if stage["parent"] is not None:
            lines.append(f"  {names[stage['parent']]} --> {node}")
        elif "path" in source:
            lines.append(f'  {node}_init(["{source["path"]}"]) --> {node}')
    last = lineage["last_stage"]
    lines += [
        *("```", "", f"Code: {lineage['code']}.", ""),
        f"| stage | status | from | attention | data | step | dev | test | on {last} |",
        "|---|---|---|---|---|---:|---:|---:|---:|",
    ]
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
            _percent(stage[_TEST_ON_LAST]),
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
