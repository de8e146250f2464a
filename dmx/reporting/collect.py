"""Find out what a folder is (a study, a single run, a curriculum), and read it into a RunReport."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx.errors import ConfigError, DataError, DmxError
from dmx.reporting.curriculum import is_curriculum, read_curriculum
from dmx.reporting.labels import UNKNOWN, attention_label
from dmx.reporting.reading import Document, read_dev_split, read_document, read_scalars
from dmx.reporting.records import Kind, RunReport, Trial
from dmx.reporting.studies import read_study
from dmx.runs import layout
from dmx.runs.metrics import BEST_STEP, DEV_ACCURACY, REPORT_KEYS, STEPS, TEST_ACCURACY, TEST_LOSS
from dmx.runs.study import TrialStatus
from dmx.schema import read_yaml
from dmx.search.study_settings import SETTINGS, read_record

RESULT_FILE = "result.json"
_STUDY = (layout.SETTINGS_FILE, layout.STUDY_FILE, layout.OPTUNA_FILE)
_RUN = (RESULT_FILE, layout.BEST_DIR, layout.LAST_DIR, "error.txt")


def kind_of(folder: Path) -> Kind | None:
    """What the folder holds, by the files that only that kind leaves; None for anything else."""
    if is_curriculum(folder):
        return "curriculum"
    kinds: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("study", _STUDY),
        ("run", _RUN),
    )
    for kind, files in kinds:
        if any((folder / name).exists() for name in files):
            return kind
    found: Kind | None = read_record(folder).get("kind")
    return found


def runs_below(folder: Path) -> list[Path]:
    """The run folders directly in a folder, sorted by name."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(p for p in found if kind_of(p) is not None)


def collect_all(folders: Sequence[Path]) -> tuple[list[RunReport], list[DmxError]]:
    """(The runs, why others could not be read): each is read on its own.

    Raises:
        ConfigError: a folder holds no run.
    """
    found: list[RunReport] = []
    errors: list[DmxError] = []
    for folder in folders:
        if kind_of(folder) is None:
            collect(folder)  # says what is there
        try:
            found.append(collect(folder))
        except DmxError as error:
            errors.append(error)
        except Exception as error:  # a foreign file may be anything; it must not hide the others
            errors.append(DataError(f"{folder} cannot be read ({type(error).__name__}: {error})."))
    return found, errors


def collect(folder: Path) -> RunReport:
    """Read a run.

    Raises:
        ConfigError: there is no run in the folder; says what is there.
        DataError, StageError: one of its files is damaged; names it.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        what = "is a file, not a run's folder" if folder.exists() else "does not exist"
        near = [p.name for p in runs_below(folder.parent)][:8]
        hint = f"; runs there: {', '.join(near)}" if near else "; give a folder such as runs/NAME"
        raise ConfigError(f"{folder} {what}{hint}.")
    kind = kind_of(folder)
    if kind == "curriculum":
        return read_curriculum(folder)
    if kind == "study":
        return read_study(folder)
    if kind == "run":
        return read_run(folder)
    if (folder / layout.CONFIG_FILE).exists():
        raise ConfigError(f"{folder} is a checkpoint; give the run it belongs to: {folder.parent}.")
    inside = [p.name for p in runs_below(folder)]
    if inside:
        raise ConfigError(
            f"{folder} holds several runs; give one: {', '.join(inside)}. (Without --format and "
            "--out each gets its page.)"
        )
    raise ConfigError(
        f"{folder} holds no run; a run's folder has {layout.STUDY_FILE}, {RESULT_FILE} or "
        f"{layout.LINEAGE_FILE}."
    )


def read_config(folder: Path) -> Mapping[str, Any] | None:
    """The plain RunConfig beside a checkpoint; None where there is none."""
    path = folder / layout.CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return read_yaml(path)
    except ConfigError as error:
        raise DataError(f"{folder} is damaged: {error}") from None


def read_run(folder: Path) -> RunReport:
    """A single run of `dmx.train`, finished or not."""
    record = read_record(folder)
    known = Document(folder / layout.JOURNAL_FILE, record.get("settings", {}), SETTINGS)
    config = read_config(folder / layout.BEST_DIR) or read_config(folder / layout.LAST_DIR)
    config = config or known.mapping("config").values or None
    result = read_document(folder / RESULT_FILE)
    metrics = None
    for name in (layout.LAST_DIR, layout.BEST_DIR):
        metrics = metrics or read_document(folder / name / layout.METRICS_FILE)
    reports: list[dict[str, Any]] = [r for r in read_scalars(folder) if DEV_ACCURACY in r]
    if not reports and metrics is not None and STEPS in metrics.values:
        reports = [{k: v for k, v in metrics.values.items() if k in REPORT_KEYS}]
    source = result or metrics
    error = _first_line(folder / "error.txt")
    status: TrialStatus = "COMPLETE" if result else ("FAILED" if error else "RUNNING")
    environment = {
        **record.get("environment", {}),
        **(metrics.mapping("environment").values if metrics else {}),
        **({"argv": record["argv"]} if "argv" in record else {}),
    }
    best_step = None if source is None else source.whole(BEST_STEP)
    return RunReport(
        kind="run",
        name=folder.name,
        folder=folder,
        task=str((config or {}).get("task", UNKNOWN)),
        attention=attention_label(config),
        data=(source or known).text("data", UNKNOWN),
        is_sample=source.flag("is_sample") if source else False,
        data_checksum=(metrics or known).text("data_checksum"),
        options=record.get("options", {}),
        complete=result is not None,
        config=config,
        trials=(Trial(number=0, status=status, reports=tuple(reports), error=error),),
        best=0 if reports else None,
        best_step=best_step,
        test_accuracy=result.number(TEST_ACCURACY) if result else math.nan,
        test_loss=result.number(TEST_LOSS) if result else math.nan,
        environment=environment,
        **read_dev_split(folder / layout.BEST_DIR),
    )


def _first_line(path: Path) -> str:
    """The last line of a traceback: the error itself."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
