"""TensorBoard files of a trial or a run: scalars, pictures, texts, and a row of HParams.

A run writes its values at the start and its status at the end, and no experiment record: without
one TensorBoard works out the columns from the rows of all runs that it shows, so that studies with
different searched values stand in one table.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hp
from torch.utils.tensorboard import FileWriter

from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    DEV_ACCURACY,
    DEV_LOSS,
    GRADIENT_NORM,
    LEARNING_RATE,
    PEAK_MEMORY_MB,
    SAMPLES,
    SAMPLES_PER_SECOND,
    TRAIN_LOSS,
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
        """Announce the run's hyperparameters, so that its row appears in HParams now.

        With them goes what the Custom Scalars tab shows; TensorBoard merges equal ones.
        """
        shown = {k: _cell(v) for k, v in values.items()}
        self._writer.add_summary(hp.hparams_pb(shown, trial_id=group or None))
        self._writer.add_summary(_layout())
        self._writer.flush()

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
        self._writer.flush()

    def _numbers(self, numbers: Mapping[str, float], step: int) -> None:
        values = [Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        self._writer.add_summary(Summary(value=values), step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write a markdown text at an optimizer step."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._writer.add_summary(text_summary(tag, text), step)
        self._writer.flush()

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
        self._writer.flush()

    def end(self, status: str) -> None:
        """Announce how the run ended, and close the file."""
        info = plugin_data_pb2.SessionEndInfo(status=_STATUS[status], end_time_secs=time.time())
        data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
        value = Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG,
            metadata=metadata.create_summary_metadata(data),
            tensor=metadata.NULL_TENSOR,
        )
        self._writer.add_summary(Summary(value=[value]))
        self.close()

    def close(self) -> None:
        self._writer.close()


def _cell(value: Any) -> str | bool | float:
    if isinstance(value, bool | str):
        return value
    return float(value) if isinstance(value, int | float) else str(value)


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
