"""Search spaces: typed distributions over RunConfig paths, conditional ones included."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dmx.config import RunConfig, parse_run_config
from dmx.errors import ConfigError
from dmx.overrides import flatten, lay

Scalar = str | int | float | bool


class Suggests(Protocol):
    """The part of optuna.Trial that a space needs."""

    def suggest_categorical(self, name: str, choices: Any, /) -> Any: ...  # noqa: D102
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...  # noqa: D102
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...  # noqa: D102


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
        """Draw one point: dotted path -> value."""
        point = {name: dist.suggest(trial, name) for name, dist in self.space.items()}
        for condition in self.conditions:
            if point.get(condition.key, self.defaults.get(condition.key)) == condition.value:
                for name, dist in condition.then.items():
                    point[name] = dist.suggest(trial, name)
        return point

    def distributions(self) -> dict[str, Distribution]:
        """Every searched value, conditional ones included."""
        found = dict(self.space)
        for condition in self.conditions:
            found.update(condition.then)
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
        """Build the experiment at the defaults, at the start points and at every corner.

        Raises:
            ConfigError: a corner is impossible; names the corner.
        """
        for corner in itertools.chain([dict(s) for s in self.start], self.corners()):
            try:
                self.run_config(task, overrides, corner)
            except ConfigError as error:
                at = ", ".join(f"{k}={v}" for k, v in corner.items())
                raise ConfigError(
                    f"search space {self.name} at {at or 'its defaults'}: {error}"
                ) from None

    def first(self) -> dict[str, Scalar]:
        """The first start point, or a corner where there is none."""
        return dict(self.start[0]) if self.start else next(self.corners())

    def corners(self, limit: int = 256) -> Iterator[dict[str, Scalar]]:
        """All combinations of options and bounds; a seeded sample of them where there are more."""
        corners = list(_combinations(self.space, limit))
        for condition in self.conditions:  # in the order in which `suggest` meets them
            grown: list[dict[str, Scalar]] = []
            for corner in corners:
                if corner.get(condition.key, self.defaults.get(condition.key)) == condition.value:
                    room = max(limit // len(corners), 4)
                    grown.extend({**corner, **m} for m in _combinations(condition.then, room))
                else:
                    grown.append(corner)
            corners = grown
        yield from corners


def _combinations(space: Mapping[str, Distribution], limit: int) -> Iterator[dict[str, Scalar]]:
    options = {name: dist.values for name, dist in space.items()}
    if math.prod(len(values) for values in options.values()) <= limit:
        for combination in itertools.product(*options.values()):
            yield dict(zip(options, combination, strict=True))
        return
    draw = random.Random(0)
    for _ in range(limit):
        yield {name: draw.choice(values) for name, values in options.items()}


def nested(point: Mapping[str, Any]) -> dict[str, Any]:
    """A dotted point as a nested mapping, for printing as YAML."""
    tree: dict[str, Any] = {}
    for key, value in point.items():
        lay(tree, key, value)
    return tree
