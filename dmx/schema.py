"""Values that a user gives: strict YAML, frozen dataclasses, dotted overrides, ranges, paths.

Whatever is wrong is a ConfigError that names its file and line, or its dotted path.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from dmx.errors import ConfigError

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and has the plain values of YAML 1.2.

    1e-4 is a number, and `yes`, `no`, `on` and `off` are texts. A number that 1.1 and 1.2 read
    differently (0100, 1:30) is refused.
    """

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`
                continue
            line = key_node.start_mark.line + 1
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConfigError(f"line {line}: a key must be a plain value.")
            if key in seen:
                raise ConfigError(f"line {line}: key {key!r} is given twice.")
            seen.add(key)
        return self.construct_mapping(node, deep=True)

    def number(self, node: yaml.ScalarNode) -> Any:
        """An int or a float, in base 10 unless it says 0x or 0b."""
        text = node.value
        if ":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text):
            raise ConfigError(
                f"line {node.start_mark.line + 1}: {text} is no plain decimal number (YAML 1.1 "
                "reads another one); write it without a leading zero or a colon, or in quotes as "
                "a text."
            )
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)

    def true_or_false(self, node: yaml.ScalarNode) -> Any:
        return {"true": True, "false": False}.get(node.value.lower(), node.value)


for _tag, _construct in (
    ("map", _StrictLoader.mapping),
    ("int", _StrictLoader.number),
    ("float", _StrictLoader.number),
    ("bool", _StrictLoader.true_or_false),
):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    cast(Any, re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$")),
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
    """The value of a YAML text; errors begin with `where`."""
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > _MAX_NODES:
            raise ConfigError(f"its aliases stand for more than {_MAX_NODES:,} values.")
        return loader.construct_document(node)
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
    """The mapping in a YAML file."""
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
    """Build dataclass `cls` from a mapping; unknown keys and wrong types are errors."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or cls.__name__} must be a mapping, not {data!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    for key in map(str, data):
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {join(path, close[0])}? " if close else ""
            raise UnknownSettingError(
                join(path, key),
                f"{join(path, key)} is not a setting; {hint}allowed: {', '.join(sorted(fields))}.",
            )
    values = {k: convert(hints[k], v, join(path, k)) for k, v in data.items()}
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{join(path, name)} is required and has no value.")
    try:
        return cls(**values)
    except ConfigError as error:
        prefix = f"{path}." if path and not str(error).startswith(path) else ""
        raise ConfigError(f"{prefix}{error}") from None


_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def convert(hint: Any, value: object, path: str) -> Any:
    """`value` as type `hint`; ints pass for floats, nothing else is coerced."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # of a type and None
        (wanted,) = set(args) - {types.NoneType}
        return None if value is None else convert(wanted, value, path)
    if origin is typing.Literal:
        if value in args and type(value) is not bool:
            return value
        raise ConfigError(f"{path} is {value!r}; allowed: {', '.join(map(str, args))}.")
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} must be a list, not {value!r}.")
        return origin(convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, not {value!r}.")
        return {str(k): convert(args[1], v, join(path, str(k))) for k, v in value.items()}
    if hint is Any or hint is object:
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, cast(type, hint)):
            return value
        parse = getattr(hint, "parse", None)  # such a config has shorthands, or chooses its class
        return parse(value, path) if parse else from_dict(cast(Any, hint), value, path)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{path} is too large a number.") from None
    if hint is Path and isinstance(value, str):
        return Path(value)
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
        raise ConfigError(f"{path} must be {_NOUNS.get(hint, hint)}, not {value!r}.")
    return value


def to_dict(value: Any, *, finite: bool = False) -> Any:
    """Plain YAML-ready data of a dataclass tree; the inverse of `from_dict`.

    Args:
        finite: NaN and the infinities, which JSON does not have, become None.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        custom = getattr(value, "to_plain", None)
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        value = custom() if custom else fields
    if isinstance(value, Mapping):
        return {str(k): to_dict(v, finite=finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v, finite=finite) for v in value]
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def finite(value: Any) -> Any:
    """`to_dict`, as JSON can hold it."""
    return to_dict(value, finite=True)


def check_number(
    name: str,
    value: float | None,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Refuse a number that is NaN, infinite or outside of a range; None passes."""
    if value is None or (value >= least and above < value < below):
        return
    if below < math.inf:
        whole = isinstance(value, int) and below > 1
        wanted = f"lie in {least}..{below - 1}" if whole else f"lie in [{least}, {below})"
    else:
        wanted = f"be above {above}" if above > least else f"be at least {least}"
    wanted = {"be above 0": "be positive", "be at least 0": "not be negative"}.get(wanted, wanted)
    also = " and finite" if value == math.inf else ""
    raise ConfigError(f"{name} is {value}; it must {wanted}{also}.")


def check_range(config: object, *names: str, **bounds: float) -> None:
    """`check_number` of fields of a config, for its `__post_init__`."""
    for name in names:
        check_number(name, getattr(config, name), **bounds)


def join(path: str, key: str) -> str:
    """The dotted path of `key` below `path`."""
    return f"{path}.{key}" if path else key


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["optim.learning_rate=1e-3"]` -> `{"optim.learning_rate": 0.001}`; values are YAML."""
    flat: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {text!r} must look like a.b=value.")
        if key in flat:
            raise ConfigError(f"override {key} is given twice.")
        flat[key] = parse_yaml(value, f"override {key}")
        if flat[key] == {}:
            raise ConfigError(f"override {text!r} is an empty mapping, which sets nothing.")
    return flat


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; empty mappings vanish."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = join(prefix, str(key))
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def set_dotted(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the dotted `path` in `tree` to `value`, in place, making the mappings on the way.

    A text on the way is a shorthand for a mapping with that `name` (`attention: butterfly`);
    anything else that is no mapping is an error.
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
    node[last] = value


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
    """
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
    """`text` as a path on this machine; a URL, of which pathlib would make a folder, is refused."""
    if is_url(text):
        raise ConfigError(f"{option} {text} is in object storage; {remedy}.")
    return Path(text)
