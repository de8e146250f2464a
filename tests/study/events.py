"""TensorBoard's files read back through TensorBoard's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from tests.study.helpers import SEARCHED, journal, rows
from tests.tiny import TASK

STATUS = {
    "COMPLETE": api_pb2.STATUS_SUCCESS,
    "PRUNED": api_pb2.STATUS_SUCCESS,
    "FAILED": api_pb2.STATUS_FAILURE,
}


def plugin_data(folder: Path) -> tuple[EventAccumulator, dict[str, Any]]:
    """The reader of a run, and its HParams records by tag."""
    reader = EventAccumulator(str(folder))
    reader.Reload()
    try:
        found = reader.PluginTagToContent("hparams")
    except KeyError:
        found = {}
    return reader, {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content) for tag, content in found.items()
    }


def cell(value: Any) -> Any:
    return getattr(value, value.WhichOneof("kind"))


def layout_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Custom Scalars: category -> chart -> the tags that it shows."""
    reader = EventAccumulator(str(folder))
    reader.Reload()
    *_, event = reader.Tensors("custom_scalars__config__")  # one a session of the trial
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {c.title: {t.title: list(t.multiline.tag) for t in c.chart} for c in layout.category}


def trial_best(folder: Path) -> dict[str, Any]:
    """samples.json of a trial's best checkpoint."""
    return json.loads((folder / "best" / "samples.json").read_text(encoding="utf-8"))


def check(study: Path) -> None:
    """Each trial's values, status, curves and layout; no experiment record anywhere."""
    assert not (study / "hparams").exists()
    records = journal(study)
    for row in rows(study):
        folder = study / "trials" / f"{int(row['trial']):04d}"
        reader, found = plugin_data(folder)
        assert "_hparams_/experiment" not in found, "TensorBoard works the columns out"
        assert layout_of(folder)["accuracy"]["dev accuracy"] == ["^dev_accuracy$"]
        shown = found["_hparams_/session_start_info"].session_start_info.hparams
        assert set(shown) == {*SEARCHED, "attention", "task", "data"}, "a cell for every column"
        for name in SEARCHED:
            value = cell(shown[name])
            if row[name] == "":
                assert value == 0.0, "an unsearched mlp_dropout has its default"
            else:
                assert value == (row[name] if isinstance(value, str) else float(row[name]))
        assert cell(shown["attention"]) == "butterfly"
        assert cell(shown["task"]) == TASK and cell(shown["data"]) == f"{TASK} (tiny)"
        status = found["_hparams_/session_end_info"].session_end_info.status
        assert status == STATUS[row["status"]], (row["trial"], row["status"])
        best = trial_best(folder)
        assert best["step"] in {e.step for e in reader.Images("predictions")}
        assert best["step"] in {e.step for e in reader.Tensors("predictions/text_summary")}
        for tag in ("dev_accuracy", "best_dev_accuracy", "train_loss"):
            points = {e.step: e.value for e in reader.Scalars(tag)}
            reports = [
                e for e in records if e["event"] == "report" and e["trial"] == int(row["trial"])
            ]
            expected = {e["step"]: e["metrics"][tag] for e in reports}
            assert points.keys() == expected.keys()
            assert all(abs(points[s] - v) < 1e-6 for s, v in expected.items())
