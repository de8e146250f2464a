"""Read a study's folder: settings, Optuna's points, the journal's reports and outcomes, results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from dmx.errors import DataError
from dmx.reporting.labels import UNKNOWN, sized
from dmx.reporting.reading import Document, read_dev_split, read_document, read_points
from dmx.reporting.records import FinalSeeds, RunReport, Search, Trial
from dmx.runs import layout
from dmx.runs.metrics import DEV_ACCURACY, TEST_ACCURACY, TEST_LOSS
from dmx.runs.objectives import DEFAULT, OBJECTIVES
from dmx.runs.study import TrialStatus
from dmx.schema import flatten, read_yaml
from dmx.search.space import settings_of
from dmx.search.study_settings import read_record
from dmx.storage.journal import read_journal, wall_seconds

_STATES: dict[str, TrialStatus] = {
    "COMPLETE": "COMPLETE",
    "PRUNED": "PRUNED",
    "FAIL": "FAILED",
    "RUNNING": "RUNNING",
}


def read_study(folder: Path) -> RunReport:
    """A study of `dmx.tune`, finished, interrupted or running.

    Raises:
        DataError, StageError: a file is damaged; names it.
    """
    record = read_record(folder, "restore it from a backup")
    file = layout.JOURNAL_FILE if "event" in record else layout.SETTINGS_FILE
    settings = Document(folder / file, record.get("settings", {}))
    result = read_document(folder / layout.STUDY_FILE)
    trials = _trials(folder)
    ended = sum(t.status != "RUNNING" for t in trials)
    complete = result is not None and result.flag("complete")
    complete = complete and ended >= (settings.whole("num_trials") or 0)
    environment = result.mapping("environment").values if result else {}
    seconds = [result.number("seconds")] if result else []
    seconds.append(wall_seconds(read_journal(folder / layout.JOURNAL_FILE)[0]))
    if result is not None and _is_older(result, ended):
        result = None
    source = result or settings
    best = None
    test_accuracy = test_loss = math.nan
    best_step = None
    finals = None
    if result is not None:
        summary = result.mapping("best")
        best, best_step = summary.whole("trial"), summary.whole("step")
        test_accuracy = summary.number(TEST_ACCURACY)
        test_loss = summary.number(TEST_LOSS)
        finals = _finals(result)
    if best is None:  # still running: the best so far
        scored = [t for t in trials if math.isfinite(t.best)]
        best = max(scored, key=lambda t: (t.best, -t.number)).number if scored else None
    checkpoint = _best_folder(folder, best, whole=result is not None)
    config_file = checkpoint / layout.CONFIG_FILE
    config = read_yaml(config_file) if config_file.is_file() else None
    search = _search(settings, source)
    attention = source.text("attention", UNKNOWN)
    fixed = flatten(settings.mapping("overrides").values)
    label = source.text("data", UNKNOWN)
    return RunReport(
        kind="study",
        name=folder.name,
        folder=folder,
        task=source.text("task", UNKNOWN),
        attention=sized(attention, fixed),
        data=label,
        is_sample=source.flag("is_sample") if result else label.endswith(", not LRA"),
        data_checksum=source.text("data_checksum"),
        complete=complete,
        config=config,
        trials=trials,
        best=best,
        best_step=best_step,
        test_accuracy=test_accuracy,
        test_loss=test_loss,
        finals=finals,
        search=search,
        environment={
            **record.get("environment", {}),
            **({"argv": record["argv"]} if "argv" in record else {}),
            **environment,
            **_environment_of(folder, best),
        },
        options=record.get("options", {}),
        seconds=max((s for s in seconds if math.isfinite(s)), default=math.nan),
        **read_dev_split(checkpoint),
    )


def _is_older(result: Document, ended: int) -> bool:
    """Whether study.json is of an earlier session than the journal: more trials have ended since.

    Its best trial, and what that one's test said, may be another's by now.
    """
    counts = result.mapping("trials")
    known = [counts.whole(status) or 0 for status in counts.values]
    return bool(known) and sum(known) < ended


def _trials(folder: Path) -> tuple[Trial, ...]:
    """Points from Optuna's storage; reports and outcomes from the journal, which knows better."""
    points = read_points(folder / layout.OPTUNA_FILE)
    reports: dict[int, dict[int, Mapping[str, Any]]] = {}
    outcomes: dict[int, Mapping[str, Any]] = {}
    path = folder / layout.JOURNAL_FILE
    try:
        for event in read_journal(path)[0]:
            if event.get("event") == "report":
                metrics = event["metrics"]
                assert isinstance(metrics, dict)
                reports.setdefault(int(event["trial"]), {})[int(event["step"])] = metrics
            elif event.get("event") == "outcome":
                outcomes[int(event["trial"])] = event
    except (KeyError, TypeError, ValueError, AssertionError):
        raise DataError(f"{path} is damaged: an event lacks a value.") from None
    trials = []
    for number in sorted({*points, *reports}):
        state, params = points.get(number, ("RUNNING", {}))
        outcome = outcomes.get(number, {})
        status = outcome.get("status", _STATES.get(state, "RUNNING"))
        if status not in get_args(TrialStatus):
            raise DataError(f"{path} is damaged: a trial ended as {status!r}.")
        steps = reports.get(number, {})
        trials.append(
            Trial(
                number=number,
                status=cast(TrialStatus, status),
                params=settings_of(params),
                drawn=params,
                reports=tuple(steps[s] for s in sorted(steps)),
                error=str(outcome.get("error") or ""),
            )
        )
    return tuple(trials)


def history(folder: Path) -> list[tuple[int, float, float, float]]:
    """(trial, step, dev accuracy, time) of each report of a study, in the order of recording."""
    found = []
    for event in read_journal(folder / layout.JOURNAL_FILE)[0]:
        if event.get("event") == "report":
            value = event["metrics"].get(DEV_ACCURACY)
            accuracy = float(value) if isinstance(value, int | float) else math.nan
            found.append(
                (int(event["trial"]), float(event["step"]), accuracy, float(event.get("time", 0)))
            )
    return found


def _best_folder(folder: Path, best: int | None, *, whole: bool) -> Path:
    """The best checkpoint; while the study has not ended, that of the best trial so far."""
    own = folder / layout.BEST_DIR
    if best is None or (whole and (own / layout.CONFIG_FILE).is_file()):
        return own
    return folder / "trials" / f"{best:04d}" / layout.BEST_DIR


def _environment_of(folder: Path, best: int | None) -> Mapping[str, Any]:
    """What the best trial was trained with, as its checkpoint says."""
    of_trial = folder / "trials" / f"{best or 0:04d}" / layout.BEST_DIR
    found = read_document(folder / layout.BEST_DIR / layout.METRICS_FILE)
    found = found or (None if best is None else read_document(of_trial / layout.METRICS_FILE))
    return found.mapping("environment").values if found else {}


def _finals(result: Document) -> FinalSeeds | None:
    found = result.mapping("final_seeds")
    if not found.values:
        return None
    return FinalSeeds(
        seeds=tuple(int(s) for s in found.numbers("seeds")),
        dev_accuracies=found.numbers("dev_accuracies"),
        test_accuracies=found.numbers("test_accuracies"),
    )


def _search(settings: Document, source: Document) -> Search:
    """How the study searched; ASHA's numbers as dmx.tune chooses them, where no file has them."""
    searched = {}
    for key in settings.mapping("searched").values:
        found = settings.mapping("searched").items(key)
        plain = all(isinstance(v, str | int | float) for v in found)  # bool is an int
        numbers = not any(isinstance(v, str) for v in found[1:]) or found[:1] == ["choice"]
        if len(found) < 2 or not isinstance(found[0], str) or not plain or not numbers:
            raise DataError(f"{settings.path} is damaged: searched.{key} is no distribution.")
        searched[key] = tuple(found)
    objectives = tuple(settings.items("objectives")) or DEFAULT
    if any(name not in OBJECTIVES for name in objectives):
        raise DataError(f"{settings.path} is damaged: objectives are {list(objectives)}.")
    max_steps = settings.whole("max_steps") or source.whole("max_steps") or 1
    overrides = flatten(settings.mapping("overrides").values)
    grace, factor = _either(settings, source, "grace_steps"), 3.0
    stored = _either(settings, source, "reduction_factor")
    if math.isfinite(stored) and stored > 1:
        factor = stored
    derived = not math.isfinite(grace)
    if derived:
        every = overrides.get("train.eval_every_steps", 1)
        grace = max(every if isinstance(every, int) else 1, max_steps // 9)
    return Search(
        searched=searched,
        scheduler=settings.text("scheduler", "none"),
        sampler=settings.text("sampler", UNKNOWN),
        seed=settings.whole("seed"),
        max_steps=max_steps,
        num_trials=settings.whole("num_trials") or source.whole("num_trials") or 0,
        grace_steps=int(min(max(grace, 1), max_steps)),
        reduction_factor=factor,
        derived=derived,
        objectives=objectives,
        warm_start=tuple(str(r) for r in settings.mapping("warm_start").items("runs")),
    )


def _either(settings: Document, source: Document, key: str) -> float:
    value = settings.number(key)
    return value if math.isfinite(value) else source.number(key)
