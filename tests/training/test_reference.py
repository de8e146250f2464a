"""Models of the reference: golden outputs, dense and packed; pools; the files users have."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmx.errors import CheckpointError, ConfigError
from dmx.training.checkpoint import load_weights
from dmx.training.reference import load_model, read_output_model, rename_state
from tests.golden_files import NAMES, golden
from tests.tiny import one_sentence

BOUND = 1e-5

CONFIG = {
    "tied_weights": False,
    "transformer_dim": 16,
    "transformer_hidden_dim": 24,
    "head_dim": 4,
    "num_head": 2,
    "num_layers": 2,
    "vocab_size": 32,
    "max_seq_len": 32,
    "num_classes": 3,
    "pooling_mode": "MEAN",
    "attn_type": "softmax",
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_golden_outputs(name, packed):
    data = golden(name)
    model = load_model(data["config"], data["state"], packed=packed)
    assert model.encoder.packs is packed
    keys = ("input_ids_0", "input_ids_1") if model.paired else ("input_ids",)
    with torch.no_grad():
        logits = model(*(data[key] for key in keys))
    assert logits.shape == data["logits"].shape
    assert (logits - data["logits"]).abs().max() <= BOUND


def reference_state(config, extra=(), heads=1):
    """A random state dict with the reference's names."""
    generator = torch.Generator().manual_seed(0)
    width, hidden = config["transformer_dim"], config["transformer_hidden_dim"]
    inner = config["num_head"] * config["head_dim"]
    shapes = {
        "model.embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "model.embeddings.position_embeddings.weight": (config["max_seq_len"], width),
        "model.norm.weight": (width,),
        "model.norm.bias": (width,),
        "seq_classifer.mlpblock.0.weight": (hidden, width * heads),
        "seq_classifer.mlpblock.0.bias": (hidden,),
        "seq_classifer.mlpblock.2.weight": (config["num_classes"], hidden),
        "seq_classifer.mlpblock.2.bias": (config["num_classes"],),
    }
    for i in range(config["num_layers"]):
        at = f"model.transformer_{i}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
        for part in ("W_q", "W_k", "W_v"):
            shapes |= {f"{at}.mha.{part}.weight": (inner, width), f"{at}.mha.{part}.bias": (inner,)}
        shapes |= {f"{at}.mha.ff.weight": (width, inner), f"{at}.mha.ff.bias": (width,)}
        shapes |= {f"{at}.mlpblock.0.weight": (hidden, width), f"{at}.mlpblock.0.bias": (hidden,)}
        shapes |= {f"{at}.mlpblock.3.weight": (width, hidden), f"{at}.mlpblock.3.bias": (width,)}
        shapes |= {f"{at}.mha.attn.{name}": shape for name, shape in extra}
    return {n: torch.randn(s, generator=generator) * 0.5 for n, s in shapes.items()}


def ids():
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(1, 31, (3, 32), generator=generator)
    return values * (torch.rand(3, 32, generator=generator) < 0.6)


def recompute(state, row, pooling):
    """Logits of one sequence of a softmax model, from the reference's names and the formulas."""
    s = {n.removeprefix("model.").removeprefix("seq_classifer."): v for n, v in state.items()}

    def linear(name, x):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    tokens, mask = row.clone(), row != 0
    if pooling == "CLS":
        tokens = torch.cat([torch.tensor([31]), row[:-1]])
        mask = torch.cat([torch.tensor([True]), mask[:-1]])
    x = s["embeddings.word_embeddings.weight"][tokens] + s["embeddings.position_embeddings.weight"]
    for i in range(2):
        at = f"transformer_{i}"
        y = norm(f"{at}.norm1", x)
        q, k, v = (linear(f"{at}.mha.{p}", y) for p in ("W_q", "W_k", "W_v"))
        heads = []
        for h in (slice(0, 4), slice(4, 8)):
            weights = (q[:, h] @ k[mask][:, h].T / 2).softmax(-1)  # sqrt(head_dim) = 2
            heads.append(weights @ v[mask][:, h])
        x = x + linear(f"{at}.mha.ff", torch.cat(heads, dim=-1))
        y = F.gelu(linear(f"{at}.mlpblock.0", norm(f"{at}.norm2", x)))
        x = x + linear(f"{at}.mlpblock.3", y)
    x = norm("norm", x)
    pooled = x[0] if pooling == "CLS" else (x * mask[:, None]).sum(0) / len(row)
    return linear("mlpblock.2", linear("mlpblock.0", pooled).relu())


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("pooling", ["CLS", "MEAN"])
def test_pools_by_an_independent_computation(pooling, packed):
    config = {**CONFIG, "pooling_mode": pooling}
    state = reference_state(config)
    logits = load_model(config, state, packed=packed)(ids())
    expected = torch.stack([recompute(state, row, pooling) for row in ids()])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module."])
def test_output_files_compiled_or_not(tmp_path, prefix):
    """What torch.compile and DataParallel put before the names is no part of them."""
    data = golden("butterfly-sparse-13")
    path = tmp_path / "pathfinder32_butterfly_output.model"
    torch.save({"model_state_dict": {prefix + n: v for n, v in data["state"].items()}}, path)
    model = load_model(data["config"], data["state"])
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    load_weights(model, read_output_model(path), str(path))
    assert all(torch.equal(v, plain[n]) for n, v in model.state_dict().items())
    assert (model(data["input_ids"]) - data["logits"]).abs().max() <= BOUND


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"not a checkpoint", "cannot be read"),
        (b"", "cannot be read"),
        (Evil(), "cannot be read: it "),
        ({"model_state_dict": {}, "where": Path("x")}, "asks for pathlib.P"),
        ({"model": {}}, "no `model_state_dict`"),
        ({"model_state_dict": {"a": 3}}, "no `model_state_dict`"),
        ([1], "no `model_state_dict`"),
    ],
    ids=["missing", "text", "empty", "code", "path", "other-key", "no-tensors", "list"],
)
def test_files_that_are_no_output_models(tmp_path, content, message):
    path = tmp_path / "x_output.model"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Evil):
        path.write_bytes(pickle.dumps(content))
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        read_output_model(path)
    assert message in str(error.value) and "x_output.model" in str(error.value)
    assert "x1b" not in one_sentence(error.value)  # torch colours its messages


@pytest.mark.parametrize("zipped", [True, False])
def test_what_numpy_left_beside_the_weights_is_ignored(tmp_path, zipped):
    path = tmp_path / "x_output.model"
    weights = {"seq_classifer.mlpblock.0.bias": torch.tensor([1.0, 2.0])}
    numbers = {"best_accuracy": np.float64(0.5), "step": np.int64(3), "losses": np.arange(3.0)}
    torch.save(
        {"model_state_dict": weights, **numbers}, path, _use_new_zipfile_serialization=zipped
    )
    assert read_output_model(path)["head.0.bias"].tolist() == [1.0, 2.0]


def test_states_that_do_not_fit_are_listed():
    state = reference_state(CONFIG)
    state["model.more"] = state.pop("model.norm.bias")
    state["model.norm.weight"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as error:
        load_model(CONFIG, state)
    for part in ("encoder.norm.bias is missing", "model.more is unknown", "(5,), not (16,)"):
        assert part in str(error.value)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_reformer_stores_its_projections_twice(packed):
    """And the mask constants, in old versions of its library; its biases are never used."""
    config = {**CONFIG, "attn_type": "reformer-2", "num_hash": 2}
    extra = [("query_key.weight", (8, 16)), ("value.weight", (8, 16))]
    extra += [("mask_value_float32", ()), ("self_mask_value_float16", ())]
    state = reference_state(config, extra)
    model = load_model(config, state, packed=packed)
    before = model(ids())
    for block in model.encoder.blocks():
        block.attention.query.bias.data += 1
        block.attention.value.bias.data += 1
    assert torch.equal(model(ids()), before)
    assert model.encoder.blocks()[0].attention.mixer.num_hashes == 2


def test_attention_inside_butterfly_keeps_its_state():
    config = {
        **CONFIG,
        "attn_type": "butterfly-8",
        "butterfly_radix": 8,
        "sub_attn_type": "performer",
        "rp_dim": 6,
        "kernel_type": "relu",
    }
    state = reference_state(config, [("attn_fn.projection_matrix", (6, 4))])
    model = load_model(config, state)
    mixer = model.encoder.blocks()[1].attention.mixer.inner
    assert torch.equal(
        mixer.projection, state["model.transformer_1.mha.attn.attn_fn.projection_matrix"]
    )
    assert mixer.config.kernel == "softmax", (
        "which the reference runs, whatever its kernel_type says"
    )


def test_renaming_leaves_unknown_names_alone():
    value = torch.zeros(1)
    assert rename_state({"_orig_mod.other.weight": value}) == {"other.weight": value}


def test_configs_that_cannot_be_loaded():
    with pytest.raises(ConfigError, match="tied_weights"):
        load_model({**CONFIG, "tied_weights": True}, reference_state(CONFIG))
    with pytest.raises(ConfigError, match="num_head"):
        load_model({k: v for k, v in CONFIG.items() if k != "num_head"}, {})
