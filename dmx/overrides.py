"""Dotted overrides: `a.b=value` from the command line, and `{a.b: value}` maps, laid on dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dmx.errors import ConfigError
from dmx.schema import parse_yaml


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["optim.learning_rate=1e-3"]` -> `{"optim.learning_rate": 0.001}`; values are read as YAML.

    Raises:
        ConfigError: no `=`, an empty key, a malformed or empty value, or a key given twice.
    """
    flat: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"override {text!r} must look like a.b=value.")
        if key in flat:
            raise ConfigError(f"override {key} is given twice.")
        flat[key] = parse_yaml(value, f"override {key}")
        if flat[key] == {}:
            raise ConfigError(f"override {text!r} is an empty mapping, which sets nothing.")
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`; keys that are not dotted stay."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        lay(tree, key, value)
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; empty mappings vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def lay(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the dotted `path` in `tree` to `value`, in place, making the mappings on the way.

    A text on the way is a shorthand for a mapping with that `name` (`attention: butterfly`).

    Raises:
        ConfigError: something else on the way is no mapping.
    """
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, str):
            child = {"name": child}
        elif child is None:
            child = {}
        elif not isinstance(child, dict):
            raise ConfigError(f"{parent} is {child!r}, so {path} cannot be set; it has settings.")
        node[parent] = child
        node = child
    existing = node.get(last)
    if isinstance(value, Mapping) and isinstance(existing, dict):
        for key, item in value.items():
            lay(existing, str(key), item)
    else:
        node[last] = dict(value) if isinstance(value, Mapping) else value


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested or dotted mappings over each other, later ones winning; inputs are not changed."""
    tree: dict[str, Any] = {}
    for layer in layers:
        for path, value in flatten(layer).items():
            lay(tree, path, value)
    return tree
