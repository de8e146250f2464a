"""Search space files: YAML -> a checked SearchSpace, with a task's own part laid on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from dmx.errors import ConfigError
from dmx.overrides import flatten
from dmx.resources import find_yaml
from dmx.schema import read_yaml
from dmx.search.space import Condition, Distribution, Scalar, SearchSpace
from dmx.tasks import TASKS, task_for

_LARGEST = 2**53  # exact as a float, which Optuna computes with
_KINDS = {"choice", "uniform", "loguniform", "int", "logint"}


def load_space(name: str, task: str, family: str) -> SearchSpace:
    """The space called `name` (in search_spaces/) or at that path, with the task's part laid on.

    Raises:
        ConfigError: no such file, unknown keys, malformed distributions.
    """
    path = find_yaml(name, "search_spaces")
    raw = read_yaml(path)
    where = path.name
    allowed = {"attention", "defaults", "space", "when", "start", "tasks"}
    _only(raw, allowed, where)
    attention = raw.get("attention")
    if not isinstance(attention, str):
        raise ConfigError(f"{where}: attention must name an attention, not {attention!r}.")
    tasks = _mapping(raw.get("tasks"), f"{where}: tasks")
    for key in tasks:
        if key not in TASKS:
            try:
                task_for(key)
            except ConfigError as error:
                raise ConfigError(f"{where}: tasks: {error}") from None
    own: dict[str, Any] = {}
    for key in (family, task):
        own = {**own, **_mapping(tasks.get(key), f"{where}: tasks.{key}")}
    _only(own, {"defaults", "space", "start", "when"}, f"{where}: tasks.{task}")
    defaults: dict[str, Any] = {}
    for part in (raw.get("defaults"), own.get("defaults")):
        for key, value in flatten(_mapping(part, f"{where}: defaults")).items():
            defaults[key] = value
    space = {
        **_distributions(raw.get("space"), f"{where}: space"),
        **_distributions(own.get("space"), f"{where}: tasks.{task}.space"),
    }
    conditions = tuple(
        itertools.chain(
            _conditions(raw.get("when"), f"{where}: when"),
            _conditions(own.get("when"), f"{where}: tasks.{task}.when"),
        )
    )
    start = _starts(own.get("start", raw.get("start")), f"{where}: start")
    conditions = _ordered(conditions, space)
    found = SearchSpace(name, attention, defaults, space, conditions, start)
    every = found.names()
    for key in (*defaults, *every):
        if key in ("task", "attention", "attention.name"):
            raise ConfigError(f"{where}: {key} is not to be set here; a space is for one of each.")
    _check_conditions(found, where)
    _check_ways(found, where)
    for point in start:
        for key, value in point.items():
            if not found.holds(key, value):
                raise ConfigError(
                    f"{where}: start gives {key}={value!r}, which the space cannot yield."
                )
    return found


def _ordered(
    conditions: tuple[Condition, ...], space: Mapping[str, Distribution]
) -> tuple[Condition, ...]:
    """Each condition after those that search its key, in whatever order the file has them."""
    waiting, found = list(conditions), list[Condition]()
    while waiting:
        open_keys = {name for c in waiting for name in c.then} - set(space)
        ready = next((c for c in waiting if c.key not in open_keys), waiting[0])
        waiting.remove(ready)
        found.append(ready)
    return tuple(found)


def _check_conditions(space: SearchSpace, where: str) -> None:
    known = set(space.space)
    searched = set(space.names())
    for condition in space.conditions:
        key, value = condition.key, condition.value
        if key not in known and key in searched and key not in space.defaults:
            raise ConfigError(f"{where}: `when` searches {key} only where {key} has a value.")
        if key not in searched and key not in space.defaults:
            raise ConfigError(
                f"{where}: `when` asks for {key}, which is neither searched nor a default."
            )
        if key in searched and not space.holds(key, value):
            raise ConfigError(
                f"{where}: `when` asks for {key}={value!r}, which the space cannot yield."
            )
        known.update(condition.then)


def _check_ways(space: SearchSpace, where: str) -> None:
    """Refuse a setting that two distributions would give a value at once."""
    # Of a setting: what must hold for it to exist, by distribution; each a list of alternatives.
    ways: dict[str, list[tuple[str, dict[str, Any]]]] = {
        name: [(repr(dist), {})] for name, dist in space.space.items()
    }
    for c in space.conditions:
        before = [{}] if c.key in space.defaults else [w for _, w in ways.get(c.key, [])]
        here = [{**w, c.key: c.value} for w in before if w.get(c.key, c.value) == c.value]
        for name, dist in c.then.items():
            for other, there in ways.get(name, []):
                both = any(all(w.get(k, v) == v for k, v in there.items()) for w in here)
                if other != repr(dist) and both:
                    at = " and ".join(f"{k}={v}" for k, v in there.items()) or "every condition"
                    raise ConfigError(
                        f"{where}: {name} has two distributions at once, under {c.key}={c.value} "
                        f"and under {at}; give it one for each value of one setting."
                    )
            ways.setdefault(name, []).extend((repr(dist), w) for w in here)


def _only(raw: Mapping[str, Any], allowed: set[str], where: str) -> None:
    for key in raw:
        if key not in allowed:
            raise ConfigError(
                f"{where}: {key!r} is not a key here; allowed: {', '.join(sorted(allowed))}."
            )


def _mapping(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{where} must be a mapping, not {value!r}.")
    return value


def _distributions(value: object, where: str) -> dict[str, Distribution]:
    found = _mapping(value, where)
    for key in ("when", "start"):  # indented by mistake, it would be told to be a distribution
        if key in found:
            raise ConfigError(f"{where}.{key}: `{key}` stands beside `space`, not in it.")
    return {k: _distribution(v, f"{where}.{k}") for k, v in found.items()}


def _distribution(value: object, where: str) -> Distribution:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in _KINDS:
        raise ConfigError(
            f"{where} must be one of {{choice: [...]}}, {{uniform: [low, high]}}, "
            f"{{loguniform: [low, high]}}, {{int: [low, high]}}, {{logint: [low, high]}}, "
            f"not {value!r}."
        )
    kind, values = next(iter(value.items()))
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}.{kind} must be a list of values, not {values!r}.")
    if kind == "choice":
        if not all(isinstance(v, str | int | float) for v in values):
            raise ConfigError(f"{where}.choice may hold texts, numbers and true/false only.")
        if len(set(map(repr, values))) != len(values):
            raise ConfigError(f"{where}.choice holds a value twice.")
        return Distribution(kind, tuple(values))
    whole = kind.endswith("int")
    number: tuple[type, ...] = (int,) if whole else (int, float)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, number) for v in values):
        what = "two whole numbers" if whole else "two numbers"
        hint = ""
        if len(values) == 3:
            hint = "; for steps, list the values: {choice: [...]}"
        elif any(isinstance(v, str) for v in values):
            hint = "; numbers stand without quotes"
        raise ConfigError(f"{where}.{kind} must be [low, high], {what}, not {values!r}{hint}.")
    low, high = values
    if not -_LARGEST < low < high < _LARGEST:
        raise ConfigError(f"{where}.{kind} is [{low}, {high}]; low must be below high.")
    if kind.startswith("log") and low <= 0:
        raise ConfigError(f"{where}.{kind} starts at {low}; a logarithmic range must be positive.")
    return Distribution(kind, (low, high) if whole else (float(low), float(high)))


def _conditions(value: object, where: str) -> Iterator[Condition]:
    if value is None:
        return
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list of {{if: ..., then: ...}}.")
    for i, item in enumerate(value):
        place = f"{where}[{i}]"
        item = _mapping(item, place)
        _only(item, {"if", "then"}, place)
        test = _mapping(item.get("if"), f"{place}.if")
        if len(test) != 1:
            raise ConfigError(f"{place}.if must name one setting and one value.")
        key, wanted = next(iter(test.items()))
        then = _distributions(item.get("then"), f"{place}.then")
        if not then:
            raise ConfigError(f"{place}.then must search something.")
        yield Condition(key, wanted, then)


def _starts(value: object, where: str) -> tuple[Mapping[str, Scalar], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list of mappings.")
    return tuple(flatten(_mapping(v, f"{where}[{i}]")) for i, v in enumerate(value))
