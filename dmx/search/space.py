"""Search spaces: typed distributions over RunConfig paths, conditional ones included."""

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
from dmx.overrides import flatten, lay

Scalar = str | int | float | bool


_BRANCH = " if "
"""Divides a setting's name from the condition under which it is drawn (see SearchSpace.label)."""
_NUM_DRAWN = 32
"""Points within a space that are built before a search begins, beside all corners."""


def setting_of(label: str) -> str:
    """The setting's name in a name that Optuna knows (see SearchSpace.label)."""
    return label.partition(_BRANCH)[0]


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's parameters of one trial under the settings' own names."""
    return {setting_of(label): value for label, value in params.items()}


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
        start: points that are tried first, dotted; they may leave values open.
    """

    name: str
    attention: str
    defaults: Mapping[str, Any]
    space: Mapping[str, Distribution]
    conditions: tuple[Condition, ...] = ()
    start: tuple[Mapping[str, Scalar], ...] = field(default=())

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
                label = f"{name}{_BRANCH}{c.key}={c.value}"
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
            "start": [dict(point) for point in self.start],
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
            start=tuple({k: v for k, v in s.items() if k not in fixed} for s in self.start),
        )

    def check(self, task: str, overrides: Mapping[str, Any]) -> None:
        """Build the experiment at the start points, at every corner, and at some points within.

        Raises:
            ConfigError: a point is impossible; names the point.
        """
        drawn = (self.suggest(_Draw(seed)) for seed in range(_NUM_DRAWN))
        for point in itertools.chain([dict(s) for s in self.start], self.corners(), drawn):
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
        """The first start point, or a corner where there is none."""
        return dict(self.start[0]) if self.start else next(self.corners())

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


def nested(point: Mapping[str, Any]) -> dict[str, Any]:
    """A dotted point as a nested mapping, for printing as YAML."""
    tree: dict[str, Any] = {}
    for key, value in point.items():
        lay(tree, key, value)
    return tree


def _plain(distributions: Mapping[str, Distribution]) -> dict[str, list[Any]]:
    return {name: [d.kind, *d.values] for name, d in distributions.items()}
