"""Values that a user gives: strict YAML, frozen dataclasses, dotted overrides, paths.

Errors name the dotted path of what is wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dmx.errors import ConfigError

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and has the plain values of YAML 1.2.

    1e-4 is a number, and `yes`, `no`, `on` and `off` are texts. A number that 1.1 and 1.2 read
    differently (0100, 1:30) is refused.
    """


def _no_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`
            continue
        key = loader.construct_object(key_node, deep=True)
        try:
            twice = key in seen
        except TypeError:
            line = key_node.start_mark.line + 1
            raise ConfigError(f"line {line}: a key must be a plain value.") from None
        if twice:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _number(loader: _StrictLoader, node: yaml.ScalarNode) -> Any:
    """An int or a float, in base 10 unless it says 0x or 0b."""
    text = node.value
    if ":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text):
        raise ConfigError(
            f"line {node.start_mark.line + 1}: {text} is no plain decimal number (YAML 1.1 reads "
            "another one); write it without a leading zero or a colon, or in quotes as a text."
        )
    whole = node.tag.endswith(":int")
    return loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)


def _true_or_false(loader: _StrictLoader, node: yaml.ScalarNode) -> bool | str:
    text: str = node.value
    return text.lower() == "true" if text.lower() in ("true", "false") else text


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _number)
_StrictLoader.add_constructor("tag:yaml.org,2002:bool", _true_or_false)
_FLOAT = r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    typing.cast(Any, re.compile(_FLOAT)),
    list("-+0123456789"),
)


_MAX_NODES = 100_000


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Values of a document once its aliases are written out; a few lines can stand for 10^9."""
    if id(node) not in known:
        known[id(node)] = 1  # of itself: a recursive node is refused by the constructor
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text safely.

    Raises:
        ConfigError: not YAML, or a key given twice; names `where` and the line.
    """
    try:
        loader = _StrictLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _expanded(node, {}) > _MAX_NODES:
                raise ConfigError(f"its aliases stand for more than {_MAX_NODES:,} values.")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{where}{line} is not valid YAML: {problem}.") from None
    except (ValueError, RecursionError, AttributeError, TypeError, OverflowError) as error:
        raise ConfigError(f"{where} is not valid YAML: {type(error).__name__}.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: unreadable, malformed, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}.") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path} must hold a mapping of names to values.")
    return value


class UnknownSettingError(ConfigError):
    """A key that no dataclass has; `path` is its dotted one."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def from_dict(cls: type[T], data: object, path: str = "") -> T:
    """Build dataclass `cls` from a mapping; unknown keys and wrong types are errors.

    Raises:
        ConfigError: with the dotted path of the offending value, the value, and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or cls.__name__} must be a mapping, not {data!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f"did you mean {join(path, close[0])}? " if close else ""
            raise UnknownSettingError(
                join(path, str(key)),
                f"{join(path, str(key))} is not a setting; {hint}"
                f"allowed: {', '.join(sorted(fields))}.",
            )
    values = {k: convert(hints[k], v, join(path, str(k))) for k, v in data.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{join(path, missing[0])} is required and has no value.")
    try:
        return cls(**values)
    except ConfigError as error:
        prefix = f"{path}." if path and not str(error).startswith(path) else ""
        raise ConfigError(f"{prefix}{error}") from None


def convert(hint: Any, value: object, path: str) -> Any:
    """`value` as type `hint`; ints pass for floats, nothing else is coerced.

    Raises:
        ConfigError: the value has another type.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is type(None):
                continue
            try:
                return convert(option, value, path)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        if value in typing.get_args(hint) and type(value) is not bool:
            return value
        allowed = ", ".join(str(a) for a in typing.get_args(hint))
        raise ConfigError(f"{path} is {value!r}; allowed: {allowed}.")
    if origin in (tuple, list):
        item = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} must be a list, not {value!r}.")
        items = [convert(item, v, f"{path}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping, typing.get_origin(Mapping[str, Any])):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, not {value!r}.")
        item = typing.get_args(hint)[1]
        return {str(k): convert(item, v, join(path, str(k))) for k, v in value.items()}
    if hint is Any or hint is object:
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        parse = getattr(hint, "parse", None)  # polymorphic configs choose their own class
        return parse(value, path) if parse else from_dict(typing.cast(Any, hint), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path} is too large a number.") from None
    if hint is Path and isinstance(value, str):
        return Path(value)
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigError(f"{path} must be {names.get(hint, hint)}, not {value!r}.")
    return value


def to_dict(value: Any) -> Any:
    """Plain YAML-ready data of a dataclass tree; the inverse of `from_dict`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        custom = getattr(value, "to_plain", None)
        if custom is not None:
            return custom()
        return {
            f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init
        }
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def finite(value: Any) -> Any:
    """A value as JSON can hold it: NaN becomes null, paths and dataclasses become plain."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return finite(fields)
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def join(path: str, key: str) -> str:
    """The dotted path of `key` below `path`."""
    return f"{path}.{key}" if path else key


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
        set_dotted(tree, key, value)
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


def set_dotted(tree: dict[str, Any], path: str, value: Any) -> None:
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
            set_dotted(existing, str(key), item)
    else:
        node[last] = dict(value) if isinstance(value, Mapping) else value


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested or dotted mappings over each other, later ones winning; inputs are not changed."""
    tree: dict[str, Any] = {}
    for layer in layers:
        for path, value in flatten(layer).items():
            set_dotted(tree, path, value)
    return tree


def expand(what: str, text: str) -> str:
    """`text`, a path that a user gave, with `~` and `~user` as a shell would write them out.

    A shell itself leaves `--option=~/x`, quoted texts, variables and YAML as they are.

    Raises:
        ConfigError: no such user; names `what`.
    """
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)  # noqa: PTH111  pathlib raises, and drops a final slash
    if not found.startswith("~"):
        return found
    user = text[1:].split("/")[0]
    why = f"this machine has no user {user!r}" if user else "no home folder is known here"
    raise ConfigError(f"{what} is {text!r}, but {why}; write the path out.")


def is_url(text: str) -> bool:
    """Whether `text` names object storage and not a path."""
    return "://" in text


def local_path(option: str, text: str, remedy: str = "copy it here and name the copy") -> Path:
    """`text` as a path on this machine.

    Raises:
        ConfigError: it is a URL, of which pathlib would make a folder `s3:` here; names the option
            and ends with the remedy.
    """
    if is_url(text):
        raise ConfigError(f"{option} {text} is in object storage; {remedy}.")
    return Path(text)
