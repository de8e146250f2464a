"""TensorBoard files: scalars against steps and samples, and the Custom Scalars layout."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary

from dmx.runs.run import read_scalars
from dmx.tensorboard import RunWriter
from tests.study.events import layout_of

REPORT = {"samples": 64, "dev_accuracy": 0.5, "dev_loss": 0.7, "train_loss": 0.8, "done": False}


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {
        tag: [(e.step, pytest.approx(e.value)) for e in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def test_scalars_by_step_and_by_samples(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.scalars(REPORT, 4)
    writer.scalars({**REPORT, "samples": 128, "dev_accuracy": 0.75}, 8)
    writer.scalars({"test_accuracy": 0.25}, 8)
    writer.close()
    found = points(tmp_path)
    assert found["dev_accuracy"] == [(4, 0.5), (8, 0.75)]
    assert found["by_samples/dev_accuracy"] == [(64, 0.5), (128, 0.75)]
    assert found["by_samples/train_loss"] == [(64, 0.8), (128, 0.8)]
    assert found["test_accuracy"] == [(8, 0.25)]
    assert sorted(t for t in found if "/" in t) == [
        f"by_samples/{name}" for name in ("dev_accuracy", "dev_loss", "train_loss")
    ]


def test_a_report_reads_steps_only(tmp_path: Path) -> None:
    """`dmx.report` of a single run takes its evaluations from here, one per optimizer step."""
    writer = RunWriter(tmp_path)
    writer.scalars(REPORT, 4)
    writer.close()
    (only,) = read_scalars(tmp_path).values()
    assert only == pytest.approx({k: v for k, v in REPORT.items() if k != "done"})


def test_a_run_brings_its_layout(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.start({"optim.learning_rate": 0.1})
    writer.close()
    layout = layout_of(tmp_path)
    assert layout["accuracy"]["dev accuracy"] == ["^dev_accuracy$"]
    by_samples = layout["accuracy"]["dev accuracy by training samples"]
    assert by_samples == ["^by_samples/dev_accuracy$"]
    assert layout["loss"] == {"dev loss": ["^dev_loss$"], "train loss": ["^train_loss$"]}


def test_a_writer_on_a_full_disk_prints_nothing_and_tells_the_next_write(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda caught: shown.append(caught.exc_type))
    writer = RunWriter(tmp_path / "run")
    inner = writer._writer.event_writer._async_writer._worker
    inner._record_writer.write = lambda data: (_ for _ in ()).throw(OSError(28, "no space"))
    writer._writer.add_summary(Summary(value=[Summary.Value(tag="a", simple_value=1.0)]), 1)
    inner.join(timeout=60)
    assert not inner.is_alive()
    with pytest.raises(OSError, match="no space"):
        writer.scalars({"a": 1.0}, 1)
    assert shown == []
    other = threading.Thread(target=lambda: 1 / 0)
    other.start()
    other.join()
    assert shown == [ZeroDivisionError], "others are shown as ever"
