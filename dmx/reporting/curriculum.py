"""Read a curriculum's folder: stages, attempts, gates and lineage, from its journal and lineage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx import records as keys
from dmx.errors import DataError
from dmx.reporting.labels import UNKNOWN, attention_label
from dmx.reporting.reading import Document, read_document
from dmx.reporting.records import Attempt, RunReport, Stage, Trial
from dmx.storage.journal import read_journal

_STATUS = {"promote": "passed", "stop": "failed", "retry": "trying again", "longer": "training on"}


def read_curriculum(folder: Path) -> RunReport:
    """A curriculum, finished, stopped or running.

    Raises:
        DataError, StageError: a file is damaged; names it.
    """
    path = folder / keys.JOURNAL_FILE
    journalled = _from_journal(path)
    lineage = read_document(folder / keys.LINEAGE_FILE)
    stages = _laid_over(journalled, lineage.documents("stages") if lineage else [])
    reached = [s for s in stages if s.attempts or math.isfinite(s.dev_accuracy)]
    last = reached[-1] if reached else None
    label = last.data if last else UNKNOWN
    config = last.config if last else None
    trials = tuple(_trial(i, s) for i, s in enumerate(stages) if s.attempts)
    environment = _environment(lineage)
    return RunReport(
        kind="curriculum",
        name=folder.name,
        folder=folder,
        task=last.task if last else UNKNOWN,
        attention=attention_label(config),
        data=label or UNKNOWN,
        data_checksum=last.data_checksum if last else "",
        is_sample=any(s.data.endswith(", not LRA") for s in stages),
        complete=bool(stages) and all(s.status == "passed" for s in stages),
        config=config,
        trials=trials,
        best=trials[-1].number if trials else None,
        test_accuracy=last.test_accuracy if last else math.nan,
        environment=environment,
        seconds=math.fsum(
            a.seconds for s in stages for a in s.attempts if math.isfinite(a.seconds)
        ),
        stages=tuple(stages),
    )


def _environment(lineage: Document | None) -> Mapping[str, Any]:
    if lineage is None:
        return {}
    code = lineage.text("code")
    return {**({"code": code} if code else {}), **lineage.mapping("environment").values}


def _trial(number: int, stage: Stage) -> Trial:
    status: keys.TrialStatus = "COMPLETE" if stage.status == "passed" else "RUNNING"
    if stage.status == "failed":
        status = "FAILED"
    return Trial(
        number=number, status=status, params={}, reports=stage.attempts[-1].reports, error=""
    )


def _from_journal(path: Path) -> dict[str, Stage]:
    """The stages that were begun, in the order of their first launch."""
    attempts: dict[str, dict[int, dict[str, Any]]] = {}
    tests: dict[str, dict[str, float]] = {}
    try:
        for event in read_journal(path)[0]:
            kind, name = event.get("event"), event.get("stage")
            if not isinstance(name, str):
                continue
            if kind == "tested":
                tests.setdefault(name, {})[str(event["on"])] = float(event["accuracy"])
                continue
            if kind not in ("started", "report", "decided"):
                continue
            tries = attempts.setdefault(name, {})
            entry = tries.setdefault(int(event["attempt"]), {"reports": {}})
            if kind == "started":
                entry["started"] = event
            elif kind == "report":
                entry["reports"][int(event["step"])] = dict(event["metrics"])
            else:
                entry["decided"] = event
        return {name: _stage(name, tries, tests.get(name, {})) for name, tries in attempts.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path} is damaged: an event lacks a value.") from None


def _stage(name: str, tries: Mapping[int, Mapping[str, Any]], tests: Mapping[str, float]) -> Stage:
    attempts = []
    for number in sorted(tries):
        entry = tries[number]
        decided = entry.get("decided") or {}
        reports = tuple(entry["reports"][s] for s in sorted(entry["reports"]))
        seconds = reports[-1].get(keys.TRAIN_SECONDS, math.nan) if reports else math.nan
        attempts.append(
            Attempt(
                number=number,
                reports=reports,
                passed=decided.get("passed"),
                reason=str(decided.get("reason", "")),
                seconds=float(seconds),
            )
        )
    newest = tries[max(tries)]
    started = newest.get("started") or {}
    config = started.get("config") or {}
    source = started.get("source") or {}
    decided = newest.get("decided") or {}
    checkpoint = decided.get("checkpoint") or {}
    data = started.get("data") or {}
    accuracy = checkpoint.get(keys.DEV_ACCURACY)
    return Stage(
        name=name,
        task=str(config.get("task", name)),
        data=str(data.get("label", "")),
        data_checksum=str(data.get("checksum") or ""),
        status=_STATUS.get(str(decided.get("next")), "running"),
        parent=source.get("stage") if source.get("stage") != name else None,
        steps=int(attempts[-1].reports[-1].get(keys.STEPS, 0)) if attempts[-1].reports else 0,
        dev_accuracy=attempts[-1].best if accuracy is None else float(accuracy),
        test_accuracy=float(tests.get(name, math.nan)),
        checkpoint=str(checkpoint.get("path", "")),
        attempts=tuple(attempts),
        config=config or None,
    )


def _laid_over(known: dict[str, Stage], lineage: list[Document]) -> list[Stage]:
    """The lineage's order and what only it says, over what the journal says."""
    stages = dict(known)
    order = list(known)
    for document in lineage:
        name = document.text("name")
        if not name:
            raise DataError(f"{document.path} is damaged: {document.where} has no name.")
        old = stages.get(name)
        dev, test = document.number(keys.DEV_ACCURACY), document.number(keys.TEST_ACCURACY)
        stages[name] = Stage(
            name=name,
            task=document.text("task", old.task if old else name),
            data=_label(document, old),
            data_checksum=old.data_checksum if old else "",
            status=document.text("status", old.status if old else "passed"),
            parent=_parent(document, old),
            steps=document.whole("steps") or (old.steps if old else 0),
            dev_accuracy=dev if math.isfinite(dev) else (old.dev_accuracy if old else math.nan),
            test_on_last=document.number("test_accuracy_on_last_stage"),
            test_accuracy=test if math.isfinite(test) else (old.test_accuracy if old else math.nan),
            checkpoint=_checkpoint(document, old),
            attempts=old.attempts if old else (),
            config=old.config if old else None,
        )
        if name not in order:
            order.append(name)
    return [stages[name] for name in order]


def _parent(document: Document, old: Stage | None) -> str | None:
    """The stage it starts from, else the weights on disk, else None."""
    given = document.values.get("init_from")
    source = given if isinstance(given, Mapping) else {}
    found = document.text("parent") or str(source.get("stage") or source.get("path") or "")
    return found or (old.parent if old else None)


def _label(document: Document, old: Stage | None) -> str:
    value = document.values.get("data")
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("label"), str):
        return str(value["label"])
    return old.data if old else ""


def _checkpoint(document: Document, old: Stage | None) -> str:
    value = document.values.get("checkpoint")
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return str(value["path"])
    return old.checkpoint if old else ""
