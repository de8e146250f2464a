"""What a curriculum shows: log lines, TensorBoard, the table of stages, the lineage."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx import terminal
from dmx.attention.base import AttentionConfig
from dmx.curriculum.config import CurriculumConfig
from dmx.curriculum.planner import attempt_config
from dmx.errors import StageError
from dmx.format import duration
from dmx.registry import code_version
from dmx.runs import layout
from dmx.runs.curriculum import Curriculum, Stage
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
from dmx.schema import to_dict
from dmx.storage.files import write_atomic
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

# -- the log ------------------------------------------------------------------------------------


def log_report(record: Curriculum, event: Mapping[str, Any]) -> None:
    """One log line per evaluation, with the time that is left for the stage."""
    if event["event"] != "report":
        return
    metrics, attempt = event["metrics"], record.stage(event["stage"]).attempts[-1]
    total = int(attempt.config["train"]["num_steps"])
    with terminal.log_context(event["stage"]):
        logger.info(
            "step %s of %s: train loss %.4f, dev accuracy %.4f (best %.4f), about %s left",
            f"{event['step']:,}",
            f"{total:,}",
            *(metrics[key] for key in (TRAIN_LOSS, DEV_ACCURACY, BEST_DEV_ACCURACY)),
            duration(metrics[STEP_SECONDS] * (total - event["step"])),
        )


def log_failures(record: Curriculum, broken: Mapping[str, str]) -> None:
    """Say of each stage that did not pass why. `broken`: see run.Outcome."""
    for name, reason in broken.items():
        logger.error("stage %s could not run: %s", name, reason)
    for stage in record.stages:
        if stage.status == "failed":
            logger.error(
                "stage %s was not promoted: %s. Edit its gate or on_fail and run the same command, "
                "or train it again with --from-stage %s.",
                *(stage.name, stage.attempts[-1].reason, stage.name),
            )


# -- TensorBoard --------------------------------------------------------------------------------


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
        final, record, events = Curriculum(folder), Curriculum(folder), list(events)
        for event in events:
            final.add(event)
        for event in events:
            record.add(event)
            state = final.stage(event.get("stage", ""))
            # Attempts before a --from-stage are left out.
            kept = event.get("attempt") in [a.number for a in state.attempts]
            if kept or (event["event"] == "tested" and event["on"] in state.tests):
                self.event(record, event)

    def event(self, record: Curriculum, event: Mapping[str, Any]) -> None:
        """Add what the event brings."""
        show = {
            "started": self._started,
            "report": self._reported,
            "tested": self._tested,
            "decided": self._decided,
        }.get(event["event"])
        if show is not None:
            show(record, event)

    def _started(self, record: Curriculum, event: Mapping[str, Any]) -> None:
        config, stage = event["config"], event["stage"]
        shown = {"task": config["task"], "attention": config["attention"]["name"]}
        if isinstance(label := event["data"].get("label"), str):
            shown["data"] = label
        name = self._run_name(event)
        row = f"{self._folder.parent.name}/{name.removeprefix(_STAGES)}"
        self._writer(name).start({**shown, "stage": stage}, row)
        again = f", attempt {event['attempt']}" if event["attempt"] else ""
        for writer, number, step in self._curves(record, stage):
            title = f"**stage {number}: {stage}**{again}, task {config['task']}"
            writer.text("stage", f"{title}, from global step {step}", step)
            if number > 1 or step:
                writer.scalars({STAGE_NUMBER: number}, step)

    def _reported(self, record: Curriculum, event: Mapping[str, Any]) -> None:
        metrics, step = event["metrics"], event["step"]
        own = self._writer(self._run_name(event))
        own.scalars(metrics, step)
        if metrics.get(BEST_STEP) == step:  # of older ones only the last is still on disk
            attempt = attempt_folder(self._folder.parent, event["stage"], event["attempt"])
            write_samples(own, attempt / layout.BEST_DIR, step)
        shown = {k: metrics[k] for k in _CURVE_KEYS if k in metrics}
        for writer, number, before in self._curves(record, event["stage"]):
            writer.scalars({**shown, STAGE_NUMBER: number}, before + step)

    def _decided(self, record: Curriculum, event: Mapping[str, Any]) -> None:
        writer = self._writers.pop(self._run_name(event), None)
        if writer is not None:
            writer.end("COMPLETE" if event["failure"] is None else "FAILED")

    def _tested(self, record: Curriculum, event: Mapping[str, Any]) -> None:
        stage, accuracy = event["stage"], event["accuracy"]
        attempt = record.stage(stage).current
        if attempt is None or accuracy is None:
            return
        shown = {TEST_ACCURACY if event["on"] == stage else _TEST_ON_LAST: accuracy}
        if stage == self._curriculum.last.name:
            shown[_TEST_ON_LAST] = accuracy
        for writer, _, before in self._curves(record, stage):
            writer.scalars(shown, before + attempt.steps)

    def _curves(self, record: Curriculum, stage: str) -> Iterator[tuple[RunWriter, int, int]]:
        """Of every curve that the stage is part of: its file, and where on it the stage lies.

        That is the stage's number, from 1, and the steps before its latest attempt.
        """
        last = self._curriculum.last.name
        for leaf in sorted(self._curriculum.leaves):
            names = [s.name for s in self._curriculum.chain(leaf)]
            if stage in names:
                number = names.index(stage)
                before = [a for n in names[:number] for a in record.stage(n).attempts]
                before += record.stage(stage).attempts[:-1]
                curve = "curriculum" if leaf == last else f"curriculum-{leaf}"
                yield self._writer(curve), number + 1, sum(a.steps for a in before)

    @staticmethod
    def _run_name(event: Mapping[str, Any]) -> str:
        again = f"-attempt-{event['attempt']}" if event["attempt"] else ""
        return f"{_STAGES}{event['stage']}{again}"

    def _writer(self, name: str) -> RunWriter:
        if name not in self._writers:
            self._writers[name] = RunWriter(self._folder / name)
        return self._writers[name]

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


# -- the terminal -------------------------------------------------------------------------------


def show_status(curriculum: CurriculumConfig, folder: Path) -> None:
    """Print where a run stands; reads the journal only, so that it disturbs no session."""
    record = Curriculum.read(folder)
    if record.empty:
        raise StageError(f"there is no run in {folder}; start it without --status.")
    begun = duration(time.time() - record.created)
    title = f"{folder.name}: begun {begun} ago, {_liveness(record)}"
    terminal.console().print(_stages_table(curriculum, record, title))


def _liveness(record: Curriculum) -> str:
    """Whether a controller is at work, as far as this machine can tell."""
    session, seen = record.at_work, f"last event {duration(time.time() - record.latest)} ago"
    if session is None:
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


def show_end(curriculum: CurriculumConfig, record: Curriculum) -> None:
    """Print where a session has left the stages, and where everything lies."""
    title = f"{record.folder.name}: {curriculum.name}"
    terminal.console().print(_stages_table(curriculum, record, title))
    terminal.verbatim(f"files: {record.folder}  (lineage.json, lineage.md, journal.jsonl, stages/)")
    terminal.verbatim(f"curves: tensorboard --logdir {record.folder}")


def _stages_table(curriculum: CurriculumConfig, record: Curriculum, title: str) -> FittingTable:
    """Where every stage stands."""
    rows = []
    for stage in curriculum.stages:
        state = record.stage(stage.name)
        attempt = state.current
        total = attempt_config(stage, attempt.retry if attempt else 0).train.num_steps
        steps = attempt.steps if attempt else 0
        left = attempt.last(STEP_SECONDS) * (total - steps) if attempt else math.nan
        best = attempt.last_report.get(BEST_DEV_ACCURACY) if attempt else None
        best = state.promoted[DEV_ACCURACY] if state.promoted else best
        refused = attempt is not None and attempt.passed is False
        rows.append(
            {
                "stage": stage.name,
                "task": stage.task if stage.task != stage.name else "same",
                "state": state.status + (" (gate said no)" if refused else ""),
                "try": str(attempt.retry + 1) if attempt else "",
                "steps": f"{steps:,}/{total:,}",
                "dev acc": _accuracy(best),
                "test acc": _accuracy(state.tests.get(stage.name)),
                "on last": _accuracy(state.tests.get(curriculum.last.name)),
                "trained for": duration(state.seconds) if attempt else "",
                "to go": duration(left) if state.status == "running" and left >= 0 else "",
            }
        )
    spare = {"to go": 1, "try": 2, "trained for": 3, "task": 4}
    return table(title, rows, ("stage", "task", "state"), spare)


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def table(
    title: str,
    rows: Sequence[Mapping[str, str]],
    text: Collection[str],
    spare: Mapping[str, int],
    *,
    end: Mapping[str, str] | None = None,
) -> FittingTable:
    """Rows by column; `text`: those without numbers, `spare`: see Column, `end`: the last row."""
    columns = [
        Column(name, right=name not in text, fold=name in text, spare=spare.get(name, 0))
        for name in rows[0]
    ]
    found = FittingTable(title, columns)
    for row in rows:
        found.add_row(*row.values())
    if end is not None:
        found.add_section()
        found.add_row(*(end.get(column.title, "") for column in columns))
    return found


# -- the lineage --------------------------------------------------------------------------------

PICTURE_FILE = "lineage.md"
_COLOURS = {"passed": "#d5f5d5", "running": "#fff3c4", "failed": "#f8d0d0", "waiting": "#eeeeee"}


def write_lineage(curriculum: CurriculumConfig, record: Curriculum) -> None:
    """Write lineage.json and lineage.md, each at once."""
    lineage = describe(curriculum, record)
    text = json.dumps(lineage, indent=1, ensure_ascii=False) + "\n"
    write_atomic(record.folder / layout.LINEAGE_FILE, text)
    write_atomic(record.folder / PICTURE_FILE, picture(lineage))


def describe(curriculum: CurriculumConfig, record: Curriculum) -> dict[str, Any]:
    """The lineage as plain data. Accuracies are 0..1 or null; paths are absolute."""
    last, stages = curriculum.last.name, []
    for stage in curriculum.stages:
        state = record.stage(stage.name)
        promoted, current = state.promoted or {}, state.current
        folder = state.checkpoint if promoted else None
        fixed = {
            "name": stage.name,
            "task": stage.task,
            "attention": stage.config.attention.to_plain(),
            "status": state.status,
            "parent": stage.parent,
            "init_from": None,
            DEV_ACCURACY: promoted.get(DEV_ACCURACY),
            TEST_ACCURACY: state.tests.get(stage.name),
            _TEST_ON_LAST: state.tests.get(last),
            "checkpoint": folder,
            "sha256": promoted.get("sha256"),
            "config": folder and f"{folder}/{layout.CONFIG_FILE}",
            "step": promoted.get("step"),
            "attempts": len(state.attempts),
            "gate": {key: current and current.decision.get(key) for key in ("passed", "reason")},
        }
        stages.append(fixed | _attempt(state))
    names = {"name": record.folder.name, "curriculum": curriculum.name, "last_stage": last}
    plain: dict[str, Any] = to_dict(
        {**names, "code": code_version(), "stages": stages}, finite=True
    )
    return plain


def _attempt(state: Stage) -> dict[str, Any]:
    """What the lineage says of the attempt that is promoted, or was the latest."""
    attempt = state.shown
    if attempt is None:
        return {}
    source, trained = dict(attempt.source), attempt.trained
    if "stage" in source:
        source["path"] = str(state.folder / source["path"])
    found = {
        "init_from": source or None,
        "attempt": attempt.number,
        "folder": str(attempt_folder(state.folder, state.name, attempt.number)),
        "data": dict(attempt.data),
        "code": attempt.spec.get("code"),
        "seeds": {"model": trained["train"]["seed"], "data": trained["data"]["seed"]},
        STEPS: attempt.steps,
        TRAIN_SECONDS: attempt.last_report.get(TRAIN_SECONDS),
        "all_attempts": {STEPS: state.all_steps, TRAIN_SECONDS: state.seconds},
    }
    if attempt.search is not None:
        found["attention"] = dict(trained["attention"])
        found["search"] = {k: attempt.search[k] for k in ("trial", "num_trials", "params")}
    return {**found, PARAMETERS: attempt.last_report.get(PARAMETERS)}


def picture(lineage: Mapping[str, Any]) -> str:
    """A Markdown page with a mermaid graph of the stages, and their table."""
    graph: list[str] = []
    last = lineage["last_stage"]
    table = [
        f"| stage | status | from | attention | data | step | dev | test | on {last} |",
        "|---|---|---|---|---|---:|---:|---:|---:|",
    ]
    names = {stage["name"]: f"s{number}" for number, stage in enumerate(lineage["stages"])}
    for stage in lineage["stages"]:
        node, attention = names[stage["name"]], _attention(stage)
        source, data = stage["init_from"] or {}, stage.get("data") or {}
        dev, test, on_last = (
            _percent(stage[key]) for key in (DEV_ACCURACY, TEST_ACCURACY, _TEST_ON_LAST)
        )
        text = f"<b>{stage['name']}</b><br/>{stage['task']}<br/>{attention}"
        graph.append(f'  {node}["{text}<br/>dev {dev}, test {test}"]')
        graph.append(f"  style {node} fill:{_COLOURS[stage['status']]}")
        if stage["parent"] is not None:
            graph.append(f"  {names[stage['parent']]} --> {node}")
        elif "path" in source:
            graph.append(f'  {node}_init(["{source["path"]}"]) --> {node}')
        cells = (
            *(stage["name"], stage["status"]),
            *(source.get("stage") or source.get("path") or "-", attention),
            f"{data['label']} `{data['checksum'][:12]}`" if data else "-",
            *(str(stage["step"] or "-"), dev, test, on_last),
        )
        table.append(f"| {' | '.join(cells)} |")
    head = (f"# Lineage of {lineage['name']}", "", "```mermaid", "graph TD")
    return "\n".join([*head, *graph, "```", "", f"Code: {lineage['code']}.", "", *table]) + "\n"


def _attention(stage: Mapping[str, Any]) -> str:
    """`butterfly-64`, and which trial of how many chose it."""
    label = AttentionConfig.parse(stage["attention"], "attention").label
    found = stage.get("search")
    return label + (f" (trial {found['trial']} of {found['num_trials']})" if found else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
