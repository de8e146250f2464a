"""Attention maps: the formula by hand, the mixer's own output from them, and the command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmx import attention_maps
from dmx.attention import ATTENTIONS, AttentionConfig, MixerContext
from dmx.config import parse_run_config
from dmx.costs.measure import stand_in
from dmx.data.batches import make_batch
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.tasks import task_for
from dmx.training import attention_maps as maps
from dmx.training.attention_maps import LayerMap, layer_maps
from dmx.training.trainer import Trainer
from tests import tiny

CONTEXT = MixerContext(length=64, num_heads=2, head_dim=8, layer_index=1)


def butterfly(**changes: Any) -> AttentionConfig:
    return ATTENTIONS.get("butterfly")(block_size=16, **changes)


def test_softmax_by_hand() -> None:
    """Three keys, of which the last is masked; Dh = 4, so scores are halved."""
    mixer = ATTENTIONS.get("softmax")().build(CONTEXT)
    q = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [1, 1, 1, 1]])[None, None]
    k = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [9, 9, 9, 9]])[None, None]
    found = mixer.attention_map(q, k, torch.tensor([[True, True, False]]))[0, 0]
    scores = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.5)]  # q k^T / 2
    for row, (a, b) in zip(found.tolist(), scores, strict=True):
        total = math.exp(a) + math.exp(b)
        assert row == pytest.approx([math.exp(a) / total, math.exp(b) / total, 0.0], abs=1e-7)


@pytest.mark.parametrize("layer", [0, 1])
def test_applied_to_v_a_map_is_the_mixers_output(layer: int) -> None:
    """Groups by their definition: {base + j * stride}; stride 1 in layer 0, 4 in layer 1."""
    context = MixerContext(length=64, num_heads=2, head_dim=8, layer_index=layer)
    mixer = butterfly().build(context)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 64, 8, generator=draw) for _ in range(3))
    mask = torch.rand(3, 64, generator=draw) < 0.6
    mask[0, :16] = False  # a group of layer 0 without a real key
    found = mixer.attention_map(q, k, mask)
    out = mixer(q, k, v, mask)
    assert found.shape == (12, 2, 16, 16)
    assert (found.sum(-1) - 1).abs().max() < 1e-6
    stride = (1, 4)[layer]
    bases = [b for b in range(64) if b // stride % 16 == 0]
    for example in range(3):
        for number, base in enumerate(bases):
            places = torch.tensor([base + j * stride for j in range(16)])
            one = found[example * 4 + number]
            if mask[example, places].any():
                assert (one[:, :, ~mask[example, places]] == 0).all(), "masked keys weigh nothing"
            expected = one @ v[example][:, places]
            assert (out[example][:, places] - expected).abs().max() < 1e-6


def test_maps_of_a_model(tiny_store: Store) -> None:
    """Of every layer, in evaluation mode, while the model itself stays as it was."""
    config = maps.dense(tiny.config(model__num_layers=2, model__dropout=0.5))
    trainer = Trainer(config, tiny_store)
    batch = make_batch(tiny_store.split("dev"), np.array([4]), tiny.LENGTH)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        block.attention.mixer.register_forward_hook(
            lambda _, args, out: seen.append((args[2].detach(), out.detach()))
        )
        for block in trainer.model.encoder.blocks()
    ]
    trainer.model.train()
    found = layer_maps(trainer.model, batch)
    assert trainer.model.training
    assert [m.layer for m in found] == [0, 1] and [m.sequence for m in found] == [0, 0]
    real = int((batch.input_ids != 0).sum())
    for one, (v, out) in zip(found, seen, strict=True):
        assert int(one.real.sum()) == real
        assert sorted(one.position.flatten().tolist()) == list(range(tiny.LENGTH))
        for group in range(len(one.position)):
            expected = one.probabilities[group] @ v[0][:, one.position[group]]
            assert (out[0][:, one.position[group]] - expected).abs().max() < 1e-6
        assert float(one.received().sum()) == pytest.approx(real, rel=1e-5), "a query gives 1"
        dark = batch.input_ids[0] == 0
        in_lit_groups = torch.zeros(tiny.LENGTH, dtype=torch.bool)
        in_lit_groups[one.position[one.real.any(1)].flatten()] = True
        assert (one.received()[dark & in_lit_groups] == 0).all()
    for hook in hooks:
        hook.remove()
    trainer.close()


def test_both_texts_of_a_pair_have_maps() -> None:
    """Each text has maps of its own; the stand-in's second text is its first one reversed."""
    with stand_in(task_for("retrieval")) as store:
        settings = {k: v for k, v in tiny.SETTINGS.items() if k != "attention.block_size"}
        config = parse_run_config({"task": "retrieval", "attention": "butterfly-16"}, settings)
        trainer = Trainer(maps.dense(config), store)
        batch = make_batch(store.split("dev"), np.array([0]), trainer.length)
        found = layer_maps(trainer.model, batch)
        trainer.close()
    assert [(m.layer, m.sequence) for m in found] == [(0, 0), (0, 1)]
    assert found[0].probabilities.shape == found[1].probabilities.shape == (256, 2, 16, 16)
    assert not torch.equal(found[0].probabilities, found[1].probabilities)


def test_a_drawn_map() -> None:
    """The diagonal black, zeros white, masked rows and columns white; the fullest group first."""
    probabilities = torch.eye(4).repeat(2, 1, 1, 1)
    probabilities[1, 0, 0, 1] = 0.25
    real = torch.ones(2, 4, dtype=torch.bool)
    real[0, 3] = False
    position = torch.arange(8).view(2, 4).flip(0)  # group 1 holds the first four
    found = LayerMap(0, 0, probabilities, position, real)
    assert maps.busiest_groups(found, 1) == [1]
    assert maps.busiest_groups(found, 9) == [0, 1]
    picture = np.asarray(maps.draw_maps(found, [0, 1]))
    scale, gap = 48, 6  # 192 pixels for 4 positions
    for column, expected in enumerate(
        (
            [[0, 255, 255, 255], [255, 0, 255, 255], [255, 255, 0, 255], [255] * 4],
            [[0, 128, 255, 255], [255, 0, 255, 255], [255, 255, 0, 255], [255, 255, 255, 0]],
        )
    ):
        left = gap + column * (192 + gap)
        tile = picture[gap : gap + 192, left : left + 192]
        assert tile[scale // 2 :: scale, scale // 2 :: scale].tolist() == expected
    seen = np.asarray(maps.draw_received(found, 2))
    # Of a 2 x 2 image: pixel 1 gets 1.25, the others 1.
    assert seen[48, 144] == 0
    assert seen[48, 48] == seen[144, 48] == round(255 * (1 - math.sqrt(1 / 1.25)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run" / "best"
    with tiny.trainer(tiny_store, model__num_layers=2) as trainer:
        trainer.advance()
        trainer.save(folder)
    return folder


def words(checkpoint: Path, store: Store, *more: str) -> list[str]:
    return [str(checkpoint), "--data-root", str(store.folder.parent), *more]


def test_the_command(
    checkpoint: Path, tiny_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--examples", "3", "5", "--layers", "1", "--groups", "2")
    assert attention_maps.main(words(checkpoint, tiny_store, *more)) == 0
    out = checkpoint.parent / "attention_maps"
    names = sorted(p.name for p in out.glob("*.png"))
    assert names == sorted(
        f"example-{i}-{name}.png"
        for i in (3, 5)
        for name in ("input", "layer-1", "received-layer-1")
    )
    assert f"6 pictures in {out}" in capsys.readouterr().out
    with Image.open(out / "example-3-layer-1.png") as picture:
        assert picture.size == (6 + 2 * (192 + 6), 2 * (192 + 6 + 14) + 6)
    reader = EventAccumulator(str(out))
    reader.Reload()
    assert "example_5/layer-1" in reader.Tags()["images"]
    (text,) = reader.Tensors("example_3/text_summary")
    label = tiny.examples("dev")[3][1]
    assert text.step == 2, "optimizer steps of the checkpoint"
    assert f"label {label}" in text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--layers", "2"), "--layers 2 must lie in 0..1"),
        (("--examples", "37"), "--examples 37 must lie in 0..36"),
        (("--groups", "0"), "--groups is 0"),
        (("--max-size", "15"), "--max-size 16"),
        (("--max-size", "0"), "--max-size is 0"),
        (("--out", "/proc/nowhere"), "cannot be written"),
    ],
)
def test_bad_input(
    checkpoint: Path, tiny_store: Store, tmp_path: Path, more: tuple[str, ...], says: str
) -> None:
    out = ("--out", str(tmp_path / "out")) if "--out" not in more else ()
    with pytest.raises(ConfigError) as error:
        attention_maps.main(words(checkpoint, tiny_store, *out, *more))
    assert says in tiny.one_sentence(error.value)
    assert not (tmp_path / "out").exists(), "nothing half-written"


@pytest.mark.parametrize(
    "name", ["nystrom", "linformer", "performer", "reformer", "linear", "none"]
)
def test_attentions_without_maps_say_so(name: str) -> None:
    for config in (ATTENTIONS.get(name)(), butterfly(inner=ATTENTIONS.get(name)())):
        with pytest.raises(
            ConfigError, match=r"no attention probabilities.*butterfly, softmax"
        ) as e:
            maps.check_has_maps(config, 64)
        tiny.one_sentence(e.value)


def test_a_whole_sequence_is_too_large_unless_asked() -> None:
    softmax = ATTENTIONS.get("softmax")()
    with pytest.raises(ConfigError, match=r"4,096 x 4,096, 64 MiB .* --max-size 4096"):
        maps.check_has_maps(softmax, 4096)
    maps.check_has_maps(softmax, 4096, 4096)
    maps.check_has_maps(softmax, 1024)
    maps.check_has_maps(butterfly(), 2**20)
