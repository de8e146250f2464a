"""Sample predictions: true ones, of the best model; they do not touch training, nor stop a view."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmx.config import parse_run_config
from dmx.data.store import Manifest, Store
from dmx.data.store_writer import StoreWriter, write_store
from dmx.runs.layout import REPORT_KEYS
from dmx.schema import to_dict
from dmx.tensorboard import RunWriter
from dmx.training.job import Job
from dmx.training.runner import Runner
from dmx.training.samples import TAG, choose_samples, read_samples, write_samples
from dmx.training.trainer import Trainer, build_model
from tests import tiny


def run(folder: Path, store: Store, **changes: Any) -> list[dict[str, Any]]:
    """All reports of a run to its end."""
    config = to_dict(tiny.config(**changes))
    runner = Runner(Job(run_config=config, data_folder=str(store.folder), folder=str(folder)))
    reports = []
    try:
        while not reports or not reports[-1]["done"]:
            reports.append(runner.step())
            assert "failure" not in reports[-1], reports[-1]
    finally:
        runner.close()
    return reports


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder, tiny_store)
    return folder


def events(folder: Path) -> EventAccumulator:
    reader = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    reader.Reload()
    return reader


def test_the_same_few_examples_each_time(tiny_store: Store) -> None:
    split = tiny_store.split("dev")
    chosen = choose_samples(split)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == 8
    assert chosen.max() < tiny.SIZES["dev"]
    np.random.seed(1)
    assert choose_samples(split).tolist() == chosen.tolist()


def test_predictions_are_those_of_the_weights_beside_them(finished: Path) -> None:
    """Each example alone, dense execution, from model.safetensors and the written examples only."""
    plain = json.loads((finished / "best" / "samples.json").read_text())
    metrics = json.loads((finished / "best" / "metrics.json").read_text())
    assert plain["step"] == metrics["steps"] == metrics["best_step"]
    ones = sum(label for _, label in tiny.examples("dev"))
    assert metrics["num_dev"] == 37 and metrics["dev_majority"] == max(ones, 37 - ones) / 37
    config = tiny.config().resolved(vocab_size=512, num_classes=2)
    model = build_model(config)
    model.load_state_dict(load_file(finished / "best" / "model.safetensors"))
    model.encoder.packs = False
    model.eval()
    written = tiny.examples("dev")
    for place, index in enumerate(plain["indices"]):
        ids, label = written[index]
        row = torch.zeros(1, tiny.LENGTH, dtype=torch.long)
        row[0, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            expected = torch.softmax(model(row)[0], -1)
        assert plain["labels"][place] == label
        assert plain["predictions"][place] == int(expected.argmax())
        assert np.abs(np.array(plain["probabilities"][place]) - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("attention", ["butterfly", {"name": "reformer", "num_hashes": 2}])
def test_training_is_the_same_without_them(
    tmp_path: Path, tiny_store: Store, attention: Any
) -> None:
    """Bit for bit, with dropout and with an attention that draws at every call."""
    settings = {k: v for k, v in tiny.SETTINGS.items() if k != "attention.block_size"}
    config = parse_run_config(
        {"task": tiny.TASK, "attention": attention}, settings, {"model.dropout": 0.1}
    )
    trainer = Trainer(config, tiny_store)
    while not trainer.finished:
        trainer.advance()
    trainer.close()
    job = Job(
        run_config=to_dict(config), data_folder=str(tiny_store.folder), folder=str(tmp_path / "a")
    )
    runner = Runner(job)
    while not runner.step()["done"]:
        pass
    seen = {k: v.clone() for k, v in runner.trainer.model.state_dict().items()}
    runner.close()
    own = trainer.model.state_dict()
    assert own.keys() == seen.keys()
    assert all(torch.equal(own[name], seen[name]) for name in own)


def test_no_metric_has_the_tag() -> None:
    """TensorBoard shows a tag in one way only: as numbers, and the pictures would be gone."""
    assert TAG not in REPORT_KEYS


def test_images_in_tensorboard(tmp_path: Path, finished: Path, tiny_store: Store) -> None:
    """The written pixels, masked ones black, at the best model's step; the table says the rest."""
    plain = json.loads((finished / "best" / "samples.json").read_text())
    writer = RunWriter(tmp_path / "tb")
    assert write_samples(writer, finished / "best", plain["step"])
    writer.close()
    reader = events(tmp_path / "tb")
    (image,) = reader.Images(TAG)
    assert image.step == plain["step"]
    picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("L"))
    tile, gap = 128, 4  # 16 pixels, enlarged 8 times
    written = tiny.examples("dev")
    for place, index in enumerate(plain["indices"]):
        pixels = np.zeros(256, np.uint8)
        pixels[: len(written[index][0])] = written[index][0]
        left = gap + place % 4 * (tile + gap)
        top = gap + place // 4 * (tile + 2 * gap + 22)  # the caption is 22 high
        shown = picture[top : top + tile, left : left + tile]
        assert (shown[4::8, 4::8] == pixels.reshape(16, 16)).all()
    (text,) = reader.Tensors(f"{TAG}/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines[4:]]
    assert [int(r[0]) for r in rows] == plain["indices"]
    assert [int(r[1]) for r in rows] == plain["labels"]
    assert [int(r[2]) for r in rows] == plain["predictions"]
    right = [a == b for a, b in zip(plain["labels"], plain["predictions"], strict=True)]
    assert [r[4] == "right" for r in rows] == right


HOSTILE = b"a | b <script>alert(1)</script> **bold** [x](http://y) `c`\nnext"


def text_store(root: Path) -> Store:
    manifest = Manifest(
        task="text",
        data_name="tiny",
        origin="tests",
        note="tiny",
        num_classes=2,
        max_length=4096,
        vocab_size=512,
        dtype="uint16",
        class_names=("neg|ative", "positive"),
    )

    def fill(writer: StoreWriter) -> None:
        for split in ("train", "dev", "test"):
            for label in (0, 1, 0):
                ids = np.frombuffer(HOSTILE, np.uint8).astype(np.uint16) + np.uint16(1)
                writer.add(split, ids, label)

    return write_store(root / "text", manifest, fill)


def hand_made(store: Store, folder: Path, **changes: Any) -> Path:
    plain = {
        "step": 3,
        "data_folder": str(store.folder),
        "data_checksum": store.manifest.checksum,
        "indices": [0, 1],
        "labels": [0, 1],
        "predictions": [0, 0],
        "probabilities": [[0.75, 0.25], [0.625, 0.375]],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.json").write_text(json.dumps(plain))
    return folder


def test_texts_are_shown_and_mark_nothing_up(tmp_path: Path) -> None:
    store = text_store(tmp_path)
    writer = RunWriter(tmp_path / "tb")
    assert write_samples(writer, hand_made(store, tmp_path / "best"), 3)
    writer.close()
    reader = events(tmp_path / "tb")
    assert TAG not in reader.Tags()["images"]
    text = reader.Tensors(f"{TAG}/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = text.splitlines()[4:]
    assert [row.count("|") for row in rows] == [7, 7], "no cell breaks a row"
    assert "<script>" not in text and "**bold" not in text and "](" not in text
    assert "alert(1)" in text and "0 neg&#124;ative" in rows[0]
    assert "0.750 | right" in rows[0] and "0.625 | **wrong**" in rows[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 4},
        {"data_folder": "/nowhere"},
        {"data_checksum": "other"},
        {"indices": [0, 99]},
        {"labels": [0]},
        {"predictions": [0, 7]},
        {"probabilities": "x"},
    ],
)
def test_what_does_not_fit_is_not_shown(tmp_path: Path, changes: dict[str, Any]) -> None:
    best = hand_made(text_store(tmp_path), tmp_path / "best", **changes)
    writer = RunWriter(tmp_path / "tb")
    assert write_samples(writer, best, 3) is False
    writer.close()
    assert events(tmp_path / "tb").Tags()["tensors"] == []


def test_a_missing_or_torn_file_is_no_error(tmp_path: Path) -> None:
    assert read_samples(tmp_path) is None
    (tmp_path / "samples.json").write_text('{"step": 3, "indi')
    assert read_samples(tmp_path) is None
    (tmp_path / "samples.json").write_bytes(b"\xff\xfe")
    assert read_samples(tmp_path) is None
