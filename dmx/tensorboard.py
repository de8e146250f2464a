"""TensorBoard files: scalars per trial, and HParams with every column of every study.

TensorBoard shows the columns of the first experiment record it meets below its log folder, whatever
it is. So each study writes exactly one, in its root, and all studies of a run root keep theirs the
same: the union of all columns. Trials write only their start (values) and end (status).
"""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hp
from torch.utils.tensorboard import FileWriter

from dmx.runs.metrics import (
    BEST_DEV_ACCURACY,
    DEV_ACCURACY,
    DEV_LOSS,
    GRADIENT_NORM,
    LEARNING_RATE,
    PARAMETERS,
    PEAK_MEMORY_MB,
    SAMPLES,
    SAMPLES_PER_SECOND,
    STEP_SECONDS,
    STEPS,
    TEST_ACCURACY,
    TRAIN_LOSS,
)
from dmx.storage.files import write_atomic

COLUMNS_FILE = "hparams.json"
_METRICS = (
    BEST_DEV_ACCURACY,
    DEV_ACCURACY,
    DEV_LOSS,
    TRAIN_LOSS,
    STEPS,
    SAMPLES_PER_SECOND,
    STEP_SECONDS,
    PEAK_MEMORY_MB,
    PARAMETERS,
    TEST_ACCURACY,
)
BY_SAMPLES = "by_samples/"
_BY_SAMPLES_KEYS = (DEV_ACCURACY, DEV_LOSS, TRAIN_LOSS)
_CHARTS = {
    "accuracy": {
        "dev accuracy": DEV_ACCURACY,
        "best dev accuracy so far": BEST_DEV_ACCURACY,
        "dev accuracy by training samples": BY_SAMPLES + DEV_ACCURACY,
    },
    "loss": {"dev loss": DEV_LOSS, "train loss": TRAIN_LOSS},
    "training": {
        "learning rate": LEARNING_RATE,
        "gradient norm": GRADIENT_NORM,
        "samples per second": SAMPLES_PER_SECOND,
        "peak memory (MB)": PEAK_MEMORY_MB,
    },
}
_STATUS = {
    "COMPLETE": api_pb2.STATUS_SUCCESS,
    "PRUNED": api_pb2.STATUS_SUCCESS,
    "FAILED": api_pb2.STATUS_FAILURE,
    "RUNNING": api_pb2.STATUS_RUNNING,
}


class RunWriter:
    """Event files of one trial or run.

    Args:
        folder: where the event file goes; the run's name in TensorBoard is its path.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        keep_writers_quiet()
        self._writer = FileWriter(str(folder), flush_secs=2)

    def start(self, values: Mapping[str, Any], group: str = "") -> None:
        """Announce the run's hyperparameters: the row appears in HParams now."""
        shown = {k: _cell(v) for k, v in values.items()}
        self._writer.add_summary(hp.hparams_pb(shown, trial_id=group or None))
        self.flush()

    def scalars(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write all numbers of `metrics` at an optimizer step, and the main ones by samples.

        TensorBoard's horizontal axis is the step or the time; a second tag, whose step is the
        number of training samples, compares runs of different batch sizes.
        """
        numbers = {
            k: float(v)
            for k, v in metrics.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        }
        self._numbers(numbers, step)
        if SAMPLES in numbers:
            shown = {BY_SAMPLES + k: numbers[k] for k in _BY_SAMPLES_KEYS if k in numbers}
            self._numbers(shown, int(numbers[SAMPLES]))
        self.flush()

    def _numbers(self, numbers: Mapping[str, float], step: int) -> None:
        values = [Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        self._writer.add_summary(Summary(value=values), step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write a markdown text at an optimizer step."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._writer.add_summary(text_summary(tag, text), step)
        self.flush()

    def layout(self) -> None:
        """Write what the Custom Scalars tab shows; TensorBoard merges equal ones of many runs."""
        self._writer.add_summary(_layout())
        self.flush()

    def image(self, tag: str, picture: Image.Image, step: int = 0) -> None:
        """Write a picture at an optimizer step."""
        content = io.BytesIO()
        picture.convert("RGB").save(content, format="PNG")
        image = Summary.Image(
            width=picture.width,
            height=picture.height,
            colorspace=3,
            encoded_image_string=content.getvalue(),
        )
        self._writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
        self.flush()

    def end(self, status: str) -> None:
        """Announce how the run ended, and close the file."""
        info = plugin_data_pb2.SessionEndInfo(status=_STATUS[status], end_time_secs=time.time())
        data = metadata.create_summary_metadata(
            plugin_data_pb2.HParamsPluginData(session_end_info=info)
        )
        tag = metadata.SESSION_END_INFO_TAG
        value = Summary.Value(tag=tag, metadata=data, tensor=metadata.NULL_TENSOR)
        self._writer.add_summary(Summary(value=[value]))
        self.close()

    def flush(self) -> None:
        """Make what was written visible."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _cell(value: Any) -> str | bool | float:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return float(value)
    return str(value)


@dataclass(frozen=True)
class Column:
    """A hyperparameter column: its discrete options, or the bounds of a number."""

    options: tuple[str | bool | float | int, ...] = ()
    low: float | None = None
    high: float | None = None

    def united(self, other: Column) -> Column:
        """The column that holds both studies' values."""
        if self.options and other.options:
            return Column((*self.options, *(o for o in other.options if o not in self.options)))
        every = [self.low, self.high, other.low, other.high, *self.options, *other.options]
        numbers = [float(v) for v in every if isinstance(v, int | float)]
        if any(isinstance(v, str) for v in every) or not numbers:
            return Column(tuple(str(v) for v in every if v is not None))
        return Column((), min(numbers), max(numbers))

    def domain(self) -> hp.Domain:
        """What TensorBoard filters by."""
        if self.options:
            cells = [_cell(o) for o in self.options]
            same = len({type(c) for c in cells}) == 1
            return hp.Discrete(cells if same else [str(c) for c in cells])
        if self.low is None or self.high is None:
            raise ValueError("a column has options or bounds")
        return hp.RealInterval(float(self.low), float(self.high))


def announce_study(folder: Path, columns: Mapping[str, Column]) -> None:
    """Write the study's columns, and bring every study of the run root up to the union of all.

    Args:
        folder: the study's folder; its parent is the run root.
        columns: every hyperparameter, conditional ones included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {key: asdict(column) for key, column in columns.items()}
    write_atomic(folder / COLUMNS_FILE, json.dumps(own, indent=1))
    studies = sorted(p.parent for p in folder.parent.glob(f"*/{COLUMNS_FILE}"))
    union: dict[str, Column] = {}
    for study in studies:
        try:
            found = json.loads((study / COLUMNS_FILE).read_text(encoding="utf-8"))
            united = dict(union)
            for key, raw in found.items():
                column = Column(tuple(raw["options"]), raw["low"], raw["high"])
                united[key] = union[key].united(column) if key in union else column
                united[key].domain()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # another study is damaged, or being written or deleted right now
        union = united
    for study in studies:
        try:
            _write_experiment(study, union)
        except OSError:  # another user's, or just deleted: its own next session writes it
            if study == folder:
                raise


def _in_order(columns: Mapping[str, Column]) -> list[tuple[str, Column]]:
    """The columns as a table reads: the learning rate, what else was searched, then constants."""
    parts = ("optim", "attention", "model", "train", "data")

    def place(item: tuple[str, Column]) -> tuple[bool, bool, int, str]:
        key, (part, dot, _) = item[0], item[0].partition(".")
        constant = not dot
        rank = parts.index(part) if part in parts else len(parts)
        return (key != "optim.learning_rate", constant, rank, key)

    return sorted(columns.items(), key=place)


def _write_experiment(study: Path, columns: Mapping[str, Column]) -> None:
    hparams = [hp.HParam(key, column.domain()) for key, column in _in_order(columns)]
    metrics = [hp.Metric(m, display_name=m) for m in _METRICS]
    folder = study / "hparams"
    old = list(folder.glob("events.*"))
    writer = FileWriter(str(folder))
    writer.add_summary(hp.hparams_config_pb(hparams=hparams, metrics=metrics))
    writer.add_summary(_layout())
    writer.close()
    for path in old:
        path.unlink(missing_ok=True)


def _layout() -> Summary:
    """The Custom Scalars tab: one chart per metric, with the curves of all trials and runs."""
    from torch.utils.tensorboard.summary import custom_scalars

    return custom_scalars(
        {
            title: {name: ["Multiline", [f"^{re.escape(tag)}$"]] for name, tag in charts.items()}
            for title, charts in _CHARTS.items()
        }
    )


_WRITER = "_AsyncWriterThread"


def keep_writers_quiet() -> None:
    """Leave it to the next write to say what failed: the thread keeps its error for that one.

    Any other thread's error, and any other error of a writer, is shown as ever.
    """
    before = threading.excepthook
    if getattr(before, "knows_writers", False):
        return

    def hook(caught: threading.ExceptHookArgs) -> None:
        writer = type(caught.thread).__name__ == _WRITER
        if not (writer and isinstance(caught.exc_value, OSError)):
            before(caught)

    hook.knows_writers = True  # type: ignore[attr-defined]
    threading.excepthook = hook
