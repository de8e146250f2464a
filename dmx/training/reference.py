"""Models of the reference code (Solving-LRA-PathX): its config keys and state dicts become ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmx.attention import AttentionConfig
from dmx.errors import CheckpointError, ConfigError
from dmx.model import Classifier, ModelConfig
from dmx.training.checkpoint import load_weights

_SIZE_KEYS = {
    "nystrom": {"num_landmarks": "num_landmarks", "conv_kernel_size": "conv_kernel_size"},
    "linformer": {"linformer_k": "projection_dim"},
    # kernel_type is left out: the reference passes it on, but its library never reads it.
    "performer": {"rp_dim": "num_features"},
    "reformer": {"num_hash": "num_hashes"},
    "butterfly": {"butterfly_radix": "block_size"},
}

_RENAMES = (
    (r"^model\.embeddings\.word_embeddings\.", "encoder.embeddings.token."),
    (r"^model\.embeddings\.position_embeddings\.", "encoder.embeddings.position."),
    (r"^model\.transformer_(\d+)\.mha\.W_q\.", r"encoder.layers.\1.attention.query."),
    (r"^model\.transformer_(\d+)\.mha\.W_k\.", r"encoder.layers.\1.attention.key."),
    (r"^model\.transformer_(\d+)\.mha\.W_v\.", r"encoder.layers.\1.attention.value."),
    (r"^model\.transformer_(\d+)\.mha\.ff\.", r"encoder.layers.\1.attention.output."),
    (
        r"^model\.transformer_(\d+)\.mha\.attn\.attn_fn\.projection_matrix$",
        r"encoder.layers.\1.attention.mixer.projection",
    ),
    (r"^model\.transformer_(\d+)\.mha\.attn\.", r"encoder.layers.\1.attention.mixer."),
    (r"^model\.transformer_(\d+)\.mlpblock\.", r"encoder.layers.\1.mlp."),
    (r"^model\.transformer_(\d+)\.", r"encoder.layers.\1."),
    (r"^model\.norm\.", "encoder.norm."),
    (r"^seq_classifer\.mlpblock\.", "head."),
)

_CORES = ("numpy.core", "numpy._core")

# Reformer holds the projections of q and v a second time, and old versions of its library save
# the mask constants.
_DROPPED = re.compile(
    r"^model\.transformer_\d+\.mha\.attn\."
    r"(query_key\.weight|value\.weight|(self_)?mask_value_float(16|32))$"
)


def attention_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our attention mapping from the reference's keys (`attn_type`, `butterfly_radix`, ...)."""
    base = str(config["attn_type"]).split("-")[0]
    settings: dict[str, Any] = {"name": base, "dropout": float(config.get("attention_dropout", 0))}
    for theirs, ours in _SIZE_KEYS.get(base, {}).items():
        if theirs in config:
            settings[ours] = config[theirs]
    if base == "nystrom" and "conv_kernel_size" not in config:
        settings["conv_kernel_size"] = None
    if base == "butterfly":
        inner = {**config, "attn_type": config.get("sub_attn_type", "softmax")}
        settings["inner"] = attention_settings(inner)
    return settings


def rename_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's parameter names as ours, without torch.compile's or DataParallel's prefix."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(?:_orig_mod\.|module\.)+", "", name)
        if _DROPPED.match(name):
            continue
        for pattern, replacement in _RENAMES:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[name] = value
    return renamed


def load_model(
    config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, packed: bool | None = None
) -> Classifier:
    """Our model with the reference's weights, in eval mode.

    Args:
        config: the reference's model config (`transformer_dim`, `attn_type`, ...).
        state_dict: its state dict, with its own names, compiled or not.
        packed: True or False forces an execution path; None takes the default.

    Raises:
        ConfigError: the config asks for what the reference's code does not have either.
    """
    if config.get("tied_weights"):
        raise ConfigError("tied_weights is true; dmx has no tied layers.")
    try:
        model_config = ModelConfig(
            num_layers=config["num_layers"],
            num_heads=config["num_head"],
            head_dim=config["head_dim"],
            embedding_dim=config["transformer_dim"],
            hidden_dim=config["transformer_hidden_dim"],
            dropout=config.get("dropout_prob", 0.0),
            embedding_dropout=config.get("embedding_dropout", config.get("dropout_prob", 0.0)),
            mlp_dropout=config.get("mlp_dropout", config.get("dropout_prob", 0.0)),
            pooling="cls" if config["pooling_mode"] == "CLS" else "mean",
            execution={None: "auto", True: "packed", False: "dense"}[packed],  # type: ignore[arg-type]
            vocab_size=config["vocab_size"],
            max_length=1 << (int(config["max_seq_len"]) - 1).bit_length(),
            num_classes=config["num_classes"],
        )
        attention = AttentionConfig.parse(attention_settings(config), "attention")
    except KeyError as error:
        raise ConfigError(f"the reference config lacks the key {error}.") from None
    state = rename_state(state_dict)
    if attention.name == "butterfly":  # the reference regroups outside of the attention
        outer, inner = ".attention.mixer.", ".attention.mixer.inner."
        state = {name.replace(outer, inner): value for name, value in state.items()}
    head = state.get("head.0.weight")
    paired = head is not None and head.shape[1] == 4 * model_config.embedding_dim
    model = Classifier(model_config, attention, paired=paired)
    load_weights(model, state, "the reference state dict")
    return model.eval()


class _Ignored:
    """Stands in for what numpy left beside the weights, such as the best accuracy."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_NUMPY = (
    *("numpy.dtype", "numpy.ndarray"),
    *(f"{core}.multiarray.{name}" for core in _CORES for name in ("scalar", "_reconstruct")),
)


def read_output_model(path: Path) -> dict[str, Tensor]:
    """The state dict in a reference `*_output.model` file, with our names.

    Raises:
        CheckpointError: unreadable, or not such a file. Nothing is unpickled but tensors.
    """
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _NUMPY]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except Exception as error:  # torch raises many types on damaged or hostile files
        # Its own text has colours in it, and advises to trust the file.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it asks for {asked[1]}, and nothing but tensors and numbers is read"
            if asked
            else "it is damaged, or was not written by torch.save"
        )
        raise CheckpointError(f"{path} cannot be read: {reason}.") from None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} holds no `model_state_dict`, so it is no *_output.model file."
        )
    return rename_state(state)
