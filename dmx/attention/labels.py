"""How journals and reports call an attention: its name, and its size where that is fixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmx.attention.base import ATTENTIONS
from dmx.runs.run import UNKNOWN


def size_path(attention: str) -> str | None:
    """`attention.block_size` for butterfly: the dotted path of its size; None where it has none."""
    field = ATTENTIONS.get(attention).size_field if attention in ATTENTIONS else None
    return None if field is None else f"attention.{field}"


def sized(attention: str, values: Mapping[str, Any]) -> str:
    """`butterfly-64`, where the dotted `values` fix the size; else the name alone."""
    path = size_path(attention)
    size = None if path is None else values.get(path)
    return attention if size is None else f"{attention}-{size}"


def attention_label(config: Mapping[str, Any] | None) -> str:
    """The label of the attention in a plain RunConfig."""
    attention = (config or {}).get("attention")
    if isinstance(attention, str):
        return attention
    if not isinstance(attention, Mapping) or not isinstance(attention.get("name"), str):
        return UNKNOWN
    return sized(attention["name"], {f"attention.{k}": v for k, v in attention.items()})
