"""Checkpoints: whole at every moment, refused when damaged, moved to another size."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmx.errors import CheckpointError
from dmx.tasks import task_for
from dmx.training import checkpoint
from dmx.training.checkpoint import open_checkpoint, repeat_checkpoint, save_checkpoint
from dmx.training.reference import load_model
from dmx.training.trainer import build_model
from dmx.training.transfer import (
    Weights,
    check_reinit,
    plan_transfer,
    read_weights,
    tile_positions,
    transfer,
)
from tests.golden_files import golden
from tests.tiny import config, one_sentence

POSITION = "encoder.embeddings.position.weight"
FILES = ["model.safetensors", "training_state.pt", "config.yaml", "metrics.json"]


def save(folder: Path, value: float = 1.0) -> None:
    save_checkpoint(
        folder,
        model_state={"w": torch.full((3,), value)},
        training_state={"step": 4},
        config=config(),
        metrics={"dev_accuracy": value},
    )


def value_of(folder: Path) -> float:
    found = open_checkpoint(folder)
    value = found.model_state()["w"][0].item()
    assert found.metrics["dev_accuracy"] == value
    return value


def test_round_trip(tmp_path):
    folder = tmp_path / "deep" / "best"
    save(folder, 0.25)
    found = open_checkpoint(folder)
    assert found.config == config() and found.metrics == {"dev_accuracy": 0.25}
    assert found.training_state() == {"step": 4}
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    save(folder, 0.5)
    assert value_of(folder) == 0.5
    assert [p.name for p in folder.parent.iterdir()] == ["best"], "nothing is left beside it"


class Killed(BaseException):
    """Stands for kill -9: nothing of ours runs after it."""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """Every save, fsync, mkdir and rename is a moment to die; after each the folder is whole."""
    count, at, dead = [0], [0], [False]

    def dying(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at[0]:
                dead[0] = True
                raise Killed
            return function(*args, **kwargs)

        return call

    def rmtree(*args, real=shutil.rmtree, **kwargs):
        if not dead[0]:  # who is dead cleans up nothing
            real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", dying(torch.save))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "mkdir", dying(Path.mkdir))
    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    folder = tmp_path / "best"
    save(folder, 1.0)
    count[0] = 0
    save(folder, 1.0)
    moments, seen = count[0], []
    for moment in range(1, moments + 1):
        count[0], at[0], dead[0] = 0, moment, False
        with pytest.raises(Killed):
            save(folder, 2.0)
        count[0], at[0], dead[0] = 0, 0, False
        seen.append(value_of(folder))
        save(folder, 1.0)
        assert value_of(folder) == 1.0
        assert [p.name for p in tmp_path.iterdir()] == ["best"], "what was left is gone"
    assert seen == sorted(seen) and set(seen) == {1.0, 2.0}, "first the old, then the new"
    assert moments >= 10


def test_a_kill_between_the_two_renames_is_put_right(tmp_path):
    folder = tmp_path / "best"
    save(folder, 0.75)
    folder.rename(tmp_path / ".best.old")
    (tmp_path / ".best.new-99999").mkdir()
    assert value_of(folder) == 0.75
    assert not (tmp_path / ".best.old").exists()
    folder.rename(tmp_path / ".best.old")
    assert read_weights(folder).state["w"][0] == 0.75
    save(folder, 0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


class Hostile:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "code ran"))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    save(tmp_path / "best")
    (tmp_path / "best" / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "best")
    text = one_sentence(caught.value)
    assert text == f"{tmp_path / 'best'} is not a whole checkpoint: {name} is missing."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b""),
        ("config.yaml", b"\xff\xfe"),
        ("config.yaml", b"a: [1"),
        ("config.yaml", b"- 1\n"),
        ("config.yaml", b"task: text\nmodel: {num_layers: -1}\n"),
        ("config.yaml", b"!!python/object/apply:os.system [true]\n"),
        ("metrics.json", b""),
        ("metrics.json", b"{"),
        ("metrics.json", b"\xff"),
        ("metrics.json", b"[1]"),
        ("metrics.json", b"[" * 100_000),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_damaged_text_is_one_sentence(tmp_path, name, content):
    save(tmp_path / "best")
    (tmp_path / "best" / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "best")
    assert f"{tmp_path / 'best'} is damaged: " in one_sentence(caught.value)


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ("task: parity\nattention: {name: softmax}\n", "task 'parity'"),
        ("task: text\nattention: {name: window, window_size: 9}\n", "attention 'window'"),
        ("task: text\nattention: {name: butterfly, inner: {name: window}}", "attention 'window'"),
    ],
)
def test_what_is_not_registered_is_not_damaged(tmp_path, content, missing):
    save(tmp_path / "best")
    (tmp_path / "best" / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "best")
    text = one_sentence(caught.value)
    assert f"{tmp_path / 'best'} is a checkpoint of {missing}, which is not registered here" in text


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
@pytest.mark.parametrize("kind", ["empty", "torn", "flipped", "text", "list", "pickle", "code"])
def test_damaged_or_hostile_weights_are_one_sentence(tmp_path, name, kind):
    folder, proof = tmp_path / "best", tmp_path / "proof"
    save(folder)
    path = folder / name
    content = path.read_bytes()
    if kind == "flipped" and name == "model.safetensors":
        path.write_bytes(content[:8] + b"\xff" * 8 + content[16:])  # of its table of tensors
    elif kind == "flipped":
        with zipfile.ZipFile(path) as archive:
            first = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
        damaged = bytearray(content)
        start = content.index(b"\x80\x02", first.header_offset)  # of the pickle itself
        damaged[start + 2 : start + 10] = b"\xff" * 8
        path.write_bytes(bytes(damaged))
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "code":
        torch.save({"w": Hostile(proof)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(proof)))
    else:
        path.write_bytes({"empty": b"", "torn": content[:-70], "text": b"hello"}[kind])
    opened = open_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught:
        opened.model_state() if name == "model.safetensors" else opened.training_state()
    assert str(path) in one_sentence(caught.value) and "damaged" in str(caught.value)
    assert not proof.exists(), "code in a checkpoint ran"


def test_a_repeated_checkpoint_is_the_same_and_is_flushed_once(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(descriptor))
    save(tmp_path / "last", 0.0)
    save(tmp_path / "best", 2.0)
    assert len(flushed) == 2 * 6  # four files, their folder, and the folder it lies in
    repeat_checkpoint(tmp_path / "best", tmp_path / "last")
    assert len(flushed) == 2 * 6 + 2
    for name in FILES:
        assert (tmp_path / "last" / name).read_bytes() == (tmp_path / "best" / name).read_bytes()
    flushed.clear()
    save(tmp_path / "last", 2.5)
    assert len(flushed) == 5, "the config is the same: the new one is the old one's file"
    assert value_of(tmp_path / "last") == 2.5 and value_of(tmp_path / "best") == 2.0
    repeat_checkpoint(tmp_path / "best", tmp_path / "last")
    kept = (tmp_path / "last" / FILES[0]).read_bytes()
    save(tmp_path / "best", 3.0)  # replaces its files, and does not write into those of last/
    assert (tmp_path / "last" / FILES[0]).read_bytes() == kept
    assert (tmp_path / "best" / FILES[0]).read_bytes() != kept


def test_without_hard_links_it_is_copied(tmp_path, monkeypatch):
    save(tmp_path / "best", 2.0)

    def refused(*_):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr("os.link", refused)
    repeat_checkpoint(tmp_path / "best", tmp_path / "last")
    for name in FILES:
        assert (tmp_path / "last" / name).read_bytes() == (tmp_path / "best" / name).read_bytes()


def test_a_path_with_nothing_there(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / "none")
    assert "does not exist; expected a checkpoint folder or a .model file" in str(caught.value)


# -- transfer -----------------------------------------------------------------------------------


def test_transfer_of_the_reference():
    """A 32 x 32 model that starts from a 16 x 16 one gives the reference's logits."""
    data = golden("transfer-16to32")
    source = load_model(data["config_source"], data["state"])
    target_config = data["config_target"]
    random = {
        name: torch.randn((1024, 64) if "position_embeddings" in name else value.shape)
        for name, value in data["state"].items()
    }
    target = load_model(target_config, random)
    weights = Weights(source.state_dict(), None)
    report = transfer(target, weights, task_for("pathfinder32-curv_baseline"))
    assert not report.fresh and report.whole
    assert len(report.moved) == len(source.state_dict()) - 1
    assert str(report) == f"moved {len(report.moved)} tensors, positions 16 x 16 to 32 x 32"
    with torch.no_grad():
        difference = (target(data["input_ids"]) - data["logits"]).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize(("side", "factor"), [(2, 1), (2, 2), (3, 2), (2, 4)])
def test_tiling_entry_by_entry(side, factor):
    """Source entry (r, c) serves the targets (factor*r + a, factor*c + b)."""
    source = torch.arange(side * side * 2.0).view(side * side, 2)
    big = side * factor
    tiled = tile_positions(source, big * big)
    for row in range(big):
        for column in range(big):
            expected = source[(row // factor) * side + column // factor]
            assert torch.equal(tiled[row * big + column], expected)


def shapes(**given: tuple[int, ...]) -> dict[str, torch.Size]:
    return {name.replace("__", "."): torch.Size(shape) for name, shape in given.items()}


TEXT, SMALL, LARGE = (task_for(n) for n in ("text", "pathfinder16-cl3-d1", "pathfinder32-cl3-d1"))


def plan(source, target, reinit=(), tasks=(None, TEXT)):
    return plan_transfer(source, target, reinit, tasks=tasks)


def test_what_differs_is_listed_with_both_shapes():
    source = shapes(a=(2, 3), b=(4,), gone=(7,))
    target = shapes(a=(2, 3), b=(5,), new=(6,))
    with pytest.raises(CheckpointError) as caught:
        plan(source, target)
    text = one_sentence(caught.value)
    for part in (
        "b is (4,) in the source, (5,) here",
        "new (6,) is not in the source",
        "gone (7,) has no place here",
        "`reinit`",
    ):
        assert part in text
    report = plan(source, target, ["b", "new", "gone"])
    assert (report.moved, report.fresh, report.dropped) == (("a",), ("b", "new"), ("gone",))
    assert str(report) == "moved 1 tensors, afresh: b, new, left out: gone"
    assert not report.whole


def test_many_differences_are_counted():
    source, target = shapes(), shapes(**{f"p{i}": (1,) for i in range(9)})
    with pytest.raises(CheckpointError, match="and 5 more"):
        plan(source, target)


def test_reinit_names_or_prefixes_with_a_dot():
    source = shapes(head__0__weight=(2,), headroom=(3,), head=(4,))
    target = shapes(head__0__weight=(9,))
    with pytest.raises(CheckpointError, match="headroom"):
        plan(source, target, ["head.", "head"])
    assert plan(source, target, ["head.", "head", "headroom"]).fresh == ("head.0.weight",)
    with pytest.raises(CheckpointError, match=r"head\.0\.weight"):
        plan(source, target, ["head", "headroom"])


def test_reinit_takes_patterns():
    source = shapes(layers__0__mlp__w=(2,), layers__1__mlp__w=(2,), layers__1__norm=(2,))
    target = shapes(layers__0__mlp__w=(3,), layers__1__mlp__w=(3,), layers__1__norm=(2,))
    assert plan(source, target, ["layers.*.mlp.*"]).fresh == ("layers.0.mlp.w", "layers.1.mlp.w")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.w"):
        plan(source, target, ["layers.1.*"])


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("haed.", "did you mean 'head.'?"),
        ("head.0.wieght", "did you mean 'head.0.weight'?"),
        ("head", "did you mean 'head.'?"),
        ("*.bias", "a name is 'norm', for example"),
    ],
)
def test_a_reinit_that_names_nothing_is_refused(entry, hint):
    names = ["head.0.weight", "norm"]
    check_reinit(["head.", "no*", "norm"], names)
    with pytest.raises(CheckpointError) as caught:
        check_reinit(["head.", entry], names)
    text = one_sentence(caught.value)
    assert f"names {entry!r}, which is no parameter" in text and hint in text


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((16, 2), (36, 2)),
        ((16, 2), (32, 2)),
        ((15, 2), (60, 2)),
        ((16, 2), (64, 3)),
        ((64, 2), (16, 2)),
        ((0, 2), (4, 2)),
        ((), (4, 2)),
    ],
)
def test_positions_that_cannot_be_tiled(source, target):
    """16 positions count as a 4 x 4 image: the source's task is unknown, the target's is one."""
    for side in (None, SMALL):
        with pytest.raises(CheckpointError, match="position"):
            plan(
                {POSITION: torch.Size(source)},
                {POSITION: torch.Size(target)},
                tasks=(side, replace(SMALL, image_side=math.isqrt(target[0]))),
            )


def positions_of(source_length, length, source_task, task):
    """The report of a transfer, and the source's row in each position then; -1: none of them."""
    table = torch.nn.Embedding(length, 2)
    torch.nn.init.constant_(table.weight, -1.0)
    model = table
    for name in ("position", "embeddings", "encoder"):
        model = torch.nn.ModuleDict({name: model})
    rows = torch.arange(float(source_length))[:, None].expand(-1, 2)
    report = transfer(model, Weights({POSITION: rows}, source_task), task)
    assert torch.equal(table.weight[:, 0], table.weight[:, 1])
    return report, table.weight[:, 0].int().tolist()


@pytest.mark.parametrize("source", [TEXT, None])
def test_a_text_keeps_its_first_positions(source):
    """And is no 32 x 32 picture of which each pixel becomes four."""
    report, rows = positions_of(1024, 4096, source, TEXT)
    assert rows == list(range(1024)) + [-1] * 3072
    assert str(report) == "moved 0 tensors, positions 0..1,023 kept, 1,024..4,095 afresh"
    assert not report.whole
    report, rows = positions_of(4096, 1024, source, TEXT)
    assert rows == list(range(1024)) and report.whole
    assert str(report) == "moved 0 tensors, positions 0..1,023 of 4,096"
    report, rows = positions_of(1024, 1024, source, TEXT)
    assert rows == list(range(1024)) and str(report) == "moved 1 tensors"


@pytest.mark.parametrize("source", [SMALL, None])
def test_a_picture_grows_with_its_side(source):
    report, rows = positions_of(256, 1024, source, LARGE)
    expected = [(p // 32 // 2) * 16 + (p % 32) // 2 for p in range(1024)]
    assert rows == expected and report.whole
    assert str(report) == "moved 0 tensors, positions 16 x 16 to 32 x 32"


def test_a_table_that_is_longer_than_the_picture():
    """Pixel (r, c) is row 16 r + c of the one table and row 32 r + c of the other."""
    report, rows = positions_of(1024, 1024, SMALL, LARGE)
    assert rows == [(p // 32 // 2) * 16 + (p % 32) // 2 for p in range(1024)]
    assert "positions 16 x 16 to 32 x 32" in str(report)
    report, rows = positions_of(256, 512, SMALL, SMALL)
    assert rows == list(range(256)) + [-1] * 256 and report.whole, "the rest is never read"


@pytest.mark.parametrize(("source", "target"), [(TEXT, LARGE), (LARGE, TEXT)])
def test_a_text_is_no_picture(source, target):
    with pytest.raises(CheckpointError, match=r"position.*\(only pathfinder32-cl3-d1 is a picture"):
        plan(
            {POSITION: torch.Size((256, 2))},
            {POSITION: torch.Size((1024, 2))},
            tasks=(source, target),
        )


def test_without_training_nothing_may_stay_fresh():
    made = build_model(config().resolved(vocab_size=512, num_classes=2))
    source = dict(made.state_dict())
    del source["head.2.weight"]
    weights = Weights(source, SMALL)
    with pytest.raises(CheckpointError, match=r"head\.2\.weight .* is not in the source\.$"):
        transfer(made, weights, SMALL, whole=True)
    with pytest.raises(CheckpointError, match=r"without training: .* afresh: head\.2\.weight"):
        transfer(made, weights, SMALL, ["head.2.weight"], whole=True)


def test_reinitialised_weights_keep_the_fresh_values():
    made = build_model(config().resolved(vocab_size=512, num_classes=2))
    fresh = {n: v.clone() for n, v in made.state_dict().items()}
    source = {n: torch.full_like(v, 0.5) for n, v in fresh.items()}
    source["head.2.weight"] = torch.zeros(7, 16)
    report = transfer(made, Weights(source, SMALL), SMALL, ["head.2.weight"])
    assert report.fresh == ("head.2.weight",)
    for name, value in made.state_dict().items():
        expected = fresh[name] if name == "head.2.weight" else source[name]
        assert torch.equal(value, expected), name


def test_metrics_are_plain_json(tmp_path):
    save(tmp_path / "best")
    assert json.loads((tmp_path / "best" / "metrics.json").read_text()) == {"dev_accuracy": 1.0}
