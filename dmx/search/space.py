"""Search spaces: typed distributions over RunConfig paths, and the YAML files that hold them."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from dmx.config import RunConfig, parse_run_config
from dmx.errors import ConfigError
from dmx.registry import find_yaml
from dmx.runs.events import BRANCH, setting_of, settings_of
from dmx.schema import flatten, read_yaml
from dmx.tasks import task_families, task_for

Scalar = str | int | float | bool


_NUM_DRAWN = 32
"""Points within a space that are built before a search begins, beside all corners."""


class Suggests(Protocol):
    """The part of optuna.Trial that a space needs."""

    def suggest_categorical(self, name: str, choices: Any, /) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Distribution:
    """One searched value: `choice` among options, or a number between two bounds, both included."""

    kind: str
    values: tuple[Scalar, ...]

    def suggest(self, trial: Suggests, name: str) -> Scalar:
        """Draw through Optuna."""
        if self.kind == "choice":
            return trial.suggest_categorical(name, self.values)
        low, high = self.values
        log = self.kind.startswith("log")
        if self.kind.endswith("int"):
            assert isinstance(low, int) and isinstance(high, int)
            return trial.suggest_int(name, low, high, log=log)
        return trial.suggest_float(name, float(low), float(high), log=log)

    def holds(self, value: object) -> bool:
        """Whether the distribution can yield the value."""
        if self.kind == "choice":
            return any(
                value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values
            )
        low, high = self.values
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        whole = not self.kind.endswith("int") or isinstance(value, int)
        return whole and float(low) <= value <= float(high)


@dataclass(frozen=True)
class Condition:
    """Further distributions that exist only where `key` has the value `value`."""

    key: str
    value: Scalar
    then: Mapping[str, Distribution]


@dataclass(frozen=True)
class SearchSpace:
    """A search space for one attention and one task.

    Attributes:
        name: of the file, or its path.
        attention: what it is for.
        defaults: fixed RunConfig values, dotted.
        space: searched values, dotted.
        conditions: the `when` part.
        initial_points: points that are tried first, dotted; they may leave values open.
    """

    name: str
    attention: str
    defaults: Mapping[str, Any]
    space: Mapping[str, Distribution]
    conditions: tuple[Condition, ...] = ()
    initial_points: tuple[Mapping[str, Scalar], ...] = field(default=())

    def suggest(self, trial: Suggests) -> dict[str, Scalar]:
        """Draw one point: dotted path -> value. The trial is asked by Optuna's names."""
        draw = {
            name: dist.suggest(trial, self.label(name, dist)) for name, dist in self.space.items()
        }
        for condition in self.conditions:
            if draw.get(condition.key, self.defaults.get(condition.key)) == condition.value:
                for name, dist in condition.then.items():
                    draw[name] = dist.suggest(trial, self.label(name, dist))
        return draw

    @functools.cached_property
    def _labels(self) -> dict[tuple[str, str], str]:
        """(setting, its distribution as text) -> Optuna's name."""
        ways: dict[str, dict[str, str]] = {n: {repr(d): n} for n, d in self.space.items()}
        for c in self.conditions:
            for name, dist in c.then.items():
                label = f"{name}{BRANCH}{c.key}={c.value}"
                ways.setdefault(name, {}).setdefault(repr(dist), label)
        return {
            (name, dist): label if len(found) > 1 else name
            for name, found in ways.items()
            for dist, label in found.items()
        }

    def label(self, name: str, dist: Distribution) -> str:
        """Optuna's name of a setting that is drawn from `dist`.

        For Optuna a name has one distribution. A setting with another one under each condition has
        a name for each: `model.dropout if attention.inner=linear`.
        """
        return self._labels[name, repr(dist)]

    def distributions(self) -> dict[str, Distribution]:
        """Every distribution by Optuna's name, conditional ones included."""
        every = itertools.chain(self.space.items(), *(c.then.items() for c in self.conditions))
        return {self.label(name, dist): dist for name, dist in every}

    def plain(self, overrides: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """Plain values of all that decides what is proposed; the same values, the same trials.

        Args:
            overrides: fixed by the command or the stage, in place of defaults.
        """
        return {
            "searched": _plain(self.distributions()),
            "defaults": {k: v for k, v in self.defaults.items() if k not in overrides},
            "when": [{"if": {c.key: c.value}, "then": _plain(c.then)} for c in self.conditions],
            "initial_points": [dict(point) for point in self.initial_points],
        }

    def names(self) -> tuple[str, ...]:
        """Every searched setting, conditional ones included."""
        return tuple(settings_of(self.distributions()))

    def holds(self, name: str, value: object) -> bool:
        """Whether a setting can have the value, under some condition or other."""
        return any(
            setting_of(label) == name and dist.holds(value)
            for label, dist in self.distributions().items()
        )

    def for_optuna(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of settings under Optuna's names: all those that the setting may turn out to have.

        Which conditions hold may still be open. Optuna's own names stay as they are.
        """
        found = {}
        labels = self.distributions()
        for name, value in values.items():
            ways = [label for label in labels if setting_of(label) == name]
            if name in labels or not ways:
                found[name] = value
            else:
                found |= {label: value for label in ways if labels[label].holds(value)}
        return found

    def run_config(
        self, task: str, overrides: Mapping[str, Any], point: Mapping[str, Any]
    ) -> RunConfig:
        """The experiment at one point. Overrides win over the space."""
        return parse_run_config(
            {"task": task, "attention": self.attention}, self.defaults, point, overrides
        )

    def without(self, overrides: Mapping[str, Any]) -> SearchSpace:
        """The space with overridden values no longer searched."""
        fixed = set(flatten(overrides))
        conditions = []
        for c in self.conditions:
            then = {k: v for k, v in c.then.items() if k not in fixed}
            active = c.key not in fixed or flatten(overrides)[c.key] == c.value
            if then and active:
                conditions.append(Condition(c.key, c.value, then))
        return SearchSpace(
            name=self.name,
            attention=self.attention,
            defaults={
                **self.defaults,
                **{k: v for k, v in flatten(overrides).items() if k in fixed},
            },
            space={k: v for k, v in self.space.items() if k not in fixed},
            conditions=tuple(conditions),
            initial_points=tuple(
                {k: v for k, v in point.items() if k not in fixed} for point in self.initial_points
            ),
        )

    def check(self, task: str, overrides: Mapping[str, Any]) -> None:
        """Build the experiment at the initial points, at every corner, and at some points within.

        Raises:
            ConfigError: a point is impossible; names the point.
        """
        drawn = (self.suggest(_Draw(seed)) for seed in range(_NUM_DRAWN))
        for point in itertools.chain([dict(s) for s in self.initial_points], self.corners(), drawn):
            try:
                self.run_config(task, overrides, point)
            except ConfigError as error:
                self._check_whole(str(error))
                at = ", ".join(f"{k}={v}" for k, v in point.items())
                raise ConfigError(
                    f"search space {self.name} at {at or 'its defaults'}: {error}"
                ) from None

    def _check_whole(self, error: str) -> None:
        """Say of a range of fractions for a whole number what it ought to be."""
        for label, dist in self.distributions().items():
            name = setting_of(label)
            if dist.kind.endswith("uniform") and error.startswith(f"{name} must be a whole number"):
                low, high = math.ceil(dist.values[0]), math.floor(dist.values[1])  # type: ignore[arg-type]
                kind = "logint" if dist.kind.startswith("log") else "int"
                raise ConfigError(
                    f"search space {self.name}: {name} is a whole number, and {dist.kind} draws "
                    f"fractions; use {{{kind}: [{low}, {high}]}}."
                ) from None

    def first(self) -> dict[str, Scalar]:
        """The first initial point, or a corner where there is none."""
        return dict(self.initial_points[0]) if self.initial_points else next(self.corners())

    def corners(self, limit: int = 256) -> Iterator[dict[str, Scalar]]:
        """All combinations of options and bounds; a seeded sample of them where there are more.

        A value that a condition asks for counts as a bound.
        """
        corners = list(self._combinations(self.space, limit))
        for condition in self.conditions:  # in the order in which `suggest` meets them
            grown: list[dict[str, Scalar]] = []
            for corner in corners:
                if corner.get(condition.key, self.defaults.get(condition.key)) == condition.value:
                    room = max(limit // len(corners), 4)
                    more = self._combinations(condition.then, room)
                    grown.extend({**corner, **m} for m in more)
                else:
                    grown.append(corner)
            corners = grown
        yield from corners

    def _combinations(
        self, space: Mapping[str, Distribution], limit: int
    ) -> Iterator[dict[str, Scalar]]:
        asked = [(c.key, c.value) for c in self.conditions]
        options = {
            name: tuple(
                dict.fromkeys([*d.values, *(v for k, v in asked if k == name and d.holds(v))])
            )
            for name, d in space.items()
        }
        if math.prod(len(values) for values in options.values()) <= limit:
            for combination in itertools.product(*options.values()):
                yield dict(zip(options, combination, strict=True))
            return
        draw = random.Random(0)
        for _ in range(limit):
            yield {name: draw.choice(values) for name, values in options.items()}


class _Draw:
    """A trial of random values, without Optuna."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Any, /) -> Any:
        return self._random.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log:
            return math.exp(self._random.uniform(math.log(low), math.log(high)))
        return self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return min(max(round(self.suggest_float(name, low, high, log=log)), low), high)


def _plain(distributions: Mapping[str, Distribution]) -> dict[str, list[Any]]:
    return {name: [d.kind, *d.values] for name, d in distributions.items()}


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
    allowed = {"attention", "defaults", "space", "when", "initial_points", "tasks"}
    _only(raw, allowed, where)
    attention = raw.get("attention")
    if not isinstance(attention, str):
        raise ConfigError(f"{where}: attention must name an attention, not {attention!r}.")
    tasks = _mapping(raw.get("tasks"), f"{where}: tasks")
    for key in tasks:
        if key not in task_families():
            try:
                task_for(key)
            except ConfigError as error:
                raise ConfigError(f"{where}: tasks: {error}") from None
    own: dict[str, Any] = {}
    for key in (family, task):
        own = {**own, **_mapping(tasks.get(key), f"{where}: tasks.{key}")}
    _only(own, {"defaults", "space", "initial_points", "when"}, f"{where}: tasks.{task}")
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
    points = own.get("initial_points", raw.get("initial_points"))
    points = _initial_points(points, f"{where}: initial_points")
    conditions = _ordered(conditions, space)
    found = SearchSpace(name, attention, defaults, space, conditions, points)
    every = found.names()
    for key in (*defaults, *every):
        if key in ("task", "attention", "attention.name"):
            raise ConfigError(f"{where}: {key} is not to be set here; a space is for one of each.")
    _check_conditions(found, where)
    _check_ways(found, where)
    for point in points:
        for key, value in point.items():
            if not found.holds(key, value):
                raise ConfigError(
                    f"{where}: initial_points gives {key}={value!r}, which the space cannot yield."
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
    for key in ("when", "initial_points"):  # indented by mistake
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


def _initial_points(value: object, where: str) -> tuple[Mapping[str, Scalar], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list of mappings.")
    return tuple(flatten(_mapping(v, f"{where}[{i}]")) for i, v in enumerate(value))
