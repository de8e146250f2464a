"""Search spaces: typed distributions over RunConfig paths, and the YAML files that hold them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dmx.config import RunConfig, parse_run_config
from dmx.errors import ConfigError
from dmx.registry import find_yaml
from dmx.runs.events import BRANCH, settings_of
from dmx.schema import convert, flatten, from_dict, read_yaml
from dmx.tasks import task_families, task_for

if TYPE_CHECKING:  # importing it takes a second
    from optuna.trial import BaseTrial

Scalar = str | int | float | bool

_KINDS = ("choice", "uniform", "loguniform", "int", "logint")
_LARGEST = 2**53  # exact as a float, which Optuna computes with
_NUM_SAMPLED = 32
"""Points within a space that are built before a search begins, beside all corners."""


@dataclass(frozen=True)
class Distribution:
    """One searched value: `choice` among options, or a number between two bounds, both included."""

    kind: str
    values: tuple[Scalar, ...]

    @classmethod
    def parse(cls, data: object, path: str) -> Distribution:
        """A distribution of a space's file, such as `{int: [1, 4]}`."""
        key = path.rpartition(".")[2]
        if key in ("when", "initial_points"):  # indented by mistake
            raise ConfigError(f"{path}: `{key}` stands beside `space`, not in it.")
        pairs = list(data.items()) if isinstance(data, Mapping) else []
        if len(pairs) != 1 or pairs[0][0] not in _KINDS:
            raise ConfigError(
                f"{path} must be one of {{choice: [...]}}, {{uniform: [low, high]}}, "
                f"{{loguniform: [low, high]}}, {{int: [low, high]}}, {{logint: [low, high]}}, "
                f"not {data!r}."
            )
        kind, values = pairs[0]
        path = f"{path}.{kind}"
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path} must be a list of values, not {values!r}.")
        if kind != "choice":
            return cls(kind, _bounds(kind, values, path))
        if not all(isinstance(v, str | int | float) for v in values):
            raise ConfigError(f"{path} may hold texts, numbers and true/false only.")
        if len(set(map(repr, values))) != len(values):
            raise ConfigError(f"{path} holds a value twice.")
        return cls(kind, tuple(values))

    @property
    def _whole(self) -> bool:
        return self.kind.endswith("int")

    @property
    def _log(self) -> bool:
        return self.kind.startswith("log")

    def suggest(self, trial: BaseTrial, name: str) -> Scalar:
        """Draw through Optuna."""
        if self.kind == "choice":
            chosen: Scalar = trial.suggest_categorical(name, self.values)  # type: ignore[assignment]
            return chosen
        low, high = self.values
        if self._whole:
            assert isinstance(low, int) and isinstance(high, int)
            return trial.suggest_int(name, low, high, log=self._log)
        return trial.suggest_float(name, float(low), float(high), log=self._log)

    def sample(self, draw: random.Random) -> Scalar:
        """Draw without Optuna."""
        if self.kind == "choice":
            return draw.choice(self.values)
        low, high = map(float, self.values)
        if self._log:
            return self.clip(math.exp(draw.uniform(math.log(low), math.log(high))))
        return self.clip(draw.uniform(low, high))

    def clip(self, value: float) -> Scalar:
        """The nearest number between the bounds."""
        low, high = map(float, self.values)
        value = min(max(value, low), high)
        return round(value) if self._whole else value

    def holds(self, value: object) -> bool:
        """Whether the distribution can yield the value."""
        if self.kind == "choice":
            return any(
                value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values
            )
        if isinstance(value, bool) or not isinstance(value, int if self._whole else int | float):
            return False
        low, high = map(float, self.values)
        return low <= value <= high


def _bounds(kind: str, values: list[Any], path: str) -> tuple[Scalar, ...]:
    whole = kind.endswith("int")
    number = int if whole else int | float
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, number) for v in values):
        what = "two whole numbers" if whole else "two numbers"
        hint = ""
        if len(values) == 3:
            hint = "; for steps, list the values: {choice: [...]}"
        elif any(isinstance(v, str) for v in values):
            hint = "; numbers stand without quotes"
        raise ConfigError(f"{path} must be [low, high], {what}, not {values!r}{hint}.")
    low, high = values
    if not -_LARGEST < low < high < _LARGEST:
        raise ConfigError(f"{path} is [{low}, {high}]; low must be below high.")
    if kind.startswith("log") and low <= 0:
        raise ConfigError(f"{path} starts at {low}; a logarithmic range must be positive.")
    return (low, high) if whole else (float(low), float(high))


@dataclass(frozen=True)
class Condition:
    """Further distributions that exist only where `key` has the value `value`."""

    key: str
    value: Scalar
    then: Mapping[str, Distribution]

    @classmethod
    def parse(cls, data: object, path: str) -> Condition:
        """An item of a space's `when`."""
        parts = data if isinstance(data, Mapping) else {}
        test, then = parts.get("if"), parts.get("then")
        tests = list(test.items()) if isinstance(test, Mapping) else []
        if set(parts) != {"if", "then"} or len(tests) != 1 or not then:
            raise ConfigError(
                f"{path} must be {{if: {{SETTING: VALUE}}, then: {{SETTING: DISTRIBUTION}}}}, with "
                f"one setting under `if`, not {data!r}."
            )
        ((key, value),) = tests
        return cls(str(key), value, convert(Mapping[str, Distribution], then, f"{path}.then"))


class Searched(NamedTuple):
    """A setting with one of its distributions.

    Attributes:
        label: Optuna's name of it, for which a name has one distribution: that of the setting; of a
            setting with another distribution under each condition, such as
            `model.dropout if attention.inner=linear`.
        when: the condition under which it exists, or None.
    """

    name: str
    label: str
    dist: Distribution
    when: Condition | None


@dataclass(frozen=True)
class SearchSpace:
    """A search space for one attention and one task.

    Attributes:
        name: of the file, or its path.
        attention: what it is for.
        defaults: fixed RunConfig values, dotted.
        space: searched values, dotted.
        conditions: the `when` part, each after those that search its key.
        initial_points: points that are tried first, dotted; they may leave values open.
    """

    name: str
    attention: str
    defaults: Mapping[str, Any]
    space: Mapping[str, Distribution]
    conditions: tuple[Condition, ...] = ()
    initial_points: tuple[Mapping[str, Scalar], ...] = ()

    @functools.cached_property
    def searched(self) -> tuple[Searched, ...]:
        """Everything that is searched, in the order in which a point is drawn."""
        every: list[tuple[str, Distribution, Condition | None]] = [
            *((name, dist, None) for name, dist in self.space.items()),
            *((name, dist, c) for c in self.conditions for name, dist in c.then.items()),
        ]
        labels: dict[str, dict[str, str]] = {}
        for name, dist, c in every:
            label = name if c is None else f"{name}{BRANCH}{c.key}={c.value}"
            labels.setdefault(name, {}).setdefault(repr(dist), label)
        return tuple(
            Searched(name, labels[name][repr(dist)] if len(labels[name]) > 1 else name, dist, c)
            for name, dist, c in every
        )

    def _point(self, value: Callable[[Searched], Scalar]) -> dict[str, Scalar]:
        """One point by Optuna's names; `value` is asked for each that exists there, in turn."""
        point, known = {}, dict(self.defaults)
        for item in self.searched:
            if item.when is None or known.get(item.when.key) == item.when.value:
                point[item.label] = known[item.name] = value(item)
        return point

    def suggest(self, trial: BaseTrial) -> dict[str, Scalar]:
        """Draw one point through Optuna: dotted path -> value."""
        return settings_of(self._point(lambda item: item.dist.suggest(trial, item.label)))

    def _sample(self, seed: int) -> dict[str, Scalar]:
        draw = random.Random(seed)
        return settings_of(self._point(lambda item: item.dist.sample(draw)))

    def point_from(self, values: Mapping[str, Any]) -> dict[str, Scalar] | None:
        """The point with these values, both by Optuna's names; None where one is missing or bad."""

        def given(item: Searched) -> Scalar:
            if not item.dist.holds(values.get(item.label)):
                raise LookupError
            found: Scalar = values[item.label]
            return found

        try:
            return self._point(given)
        except LookupError:
            return None

    def for_optuna(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of settings under Optuna's names: all those that the setting may turn out to have.

        Which conditions hold may still be open.
        """
        return {
            item.label: values[item.name]
            for item in self.searched
            if item.name in values and item.dist.holds(values[item.name])
        }

    def distributions(self) -> dict[str, Distribution]:
        """Every distribution by Optuna's name."""
        return {item.label: item.dist for item in self.searched}

    def names(self) -> tuple[str, ...]:
        """Every searched setting."""
        return tuple(dict.fromkeys(item.name for item in self.searched))

    def holds(self, name: str, value: object) -> bool:
        """Whether a setting can have the value, under some condition."""
        return any(item.name == name and item.dist.holds(value) for item in self.searched)

    def plain(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values of all that decides what is proposed, `overrides` aside."""

        def plain(distributions: Mapping[str, Distribution]) -> dict[str, Any]:
            return {name: [d.kind, *d.values] for name, d in distributions.items()}

        return {
            "searched": plain(self.distributions()),
            "defaults": {k: v for k, v in self.defaults.items() if k not in overrides},
            "when": [{"if": {c.key: c.value}, "then": plain(c.then)} for c in self.conditions],
            "initial_points": [dict(point) for point in self.initial_points],
        }

    def run_config(
        self, task: str, overrides: Mapping[str, Any], point: Mapping[str, Any]
    ) -> RunConfig:
        """The experiment at one point. Overrides win over the space."""
        return parse_run_config(
            {"task": task, "attention": self.attention}, self.defaults, point, overrides
        )

    def without(self, overrides: Mapping[str, Any]) -> SearchSpace:
        """The space with overridden values no longer searched."""
        fixed = flatten(overrides)

        def free(values: Mapping[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in values.items() if k not in fixed}

        return dataclasses.replace(
            self,
            defaults={**self.defaults, **fixed},
            space=free(self.space),
            conditions=tuple(
                Condition(c.key, c.value, then)
                for c in self.conditions
                if (then := free(c.then)) and fixed.get(c.key, c.value) == c.value
            ),
            initial_points=tuple(map(free, self.initial_points)),
        )

    def check(self, task: str, overrides: Mapping[str, Any]) -> list[tuple[str, RunConfig]]:
        """Build the experiment at the initial points, at every corner, and at some points within.

        Returns:
            What to call it in a message, and the experiment, of initial points and corners.

        Raises:
            ConfigError: a point is impossible; names the point.
        """
        runs = []
        corners = [*self.initial_points, *self.corners()]
        for point in (*corners, *map(self._sample, range(_NUM_SAMPLED))):
            at = ", ".join(f"{k}={v}" for k, v in point.items()) or "its defaults"
            where = f"search space {self.name} at {at}: "
            try:
                runs.append((where, self.run_config(task, overrides, point)))
            except ConfigError as error:
                why = str(error).removesuffix(".") + self._whole_numbers(str(error))
                raise ConfigError(f"{where}{why}.") from None
        return runs[: len(corners)]

    def _whole_numbers(self, error: str) -> str:
        """What a range of fractions for a whole number, the cause of an error, ought to be."""
        for name, _, dist, _ in self.searched:
            if dist.kind.endswith("uniform") and error.startswith(f"{name} must be a whole number"):
                low, high = map(float, dist.values)
                kind = "logint" if dist.kind.startswith("log") else "int"
                whole = f"{{{kind}: [{math.ceil(low)}, {math.floor(high)}]}}"
                return f", and {dist.kind} draws fractions; use {whole}"
        return ""

    def first(self) -> dict[str, Scalar]:
        """The first initial point, or a corner where there is none."""
        return dict(self.initial_points[0] if self.initial_points else self.corners()[0])

    def corners(self, limit: int = 256) -> list[dict[str, Scalar]]:
        """All combinations of options and bounds; a seeded sample of them where there are more.

        A value that a condition asks for counts as a bound.
        """
        corners = self._combinations(self.space, limit)
        for c in self.conditions:
            room = max(limit // len(corners), 4)
            grown: list[dict[str, Scalar]] = []
            for corner in corners:
                here = corner.get(c.key, self.defaults.get(c.key)) == c.value
                more = self._combinations(c.then, room) if here else [{}]
                grown.extend({**corner, **values} for values in more)
            corners = grown
        return corners

    def _combinations(
        self, space: Mapping[str, Distribution], limit: int
    ) -> list[dict[str, Scalar]]:
        asked = [(c.key, c.value) for c in self.conditions]
        options = {
            name: tuple(
                dict.fromkeys([*d.values, *(v for k, v in asked if k == name and d.holds(v))])
            )
            for name, d in space.items()
        }
        if math.prod(len(values) for values in options.values()) <= limit:
            return [
                dict(zip(options, values, strict=True))
                for values in itertools.product(*options.values())
            ]
        draw = random.Random(0)
        return [
            {name: draw.choice(values) for name, values in options.items()} for _ in range(limit)
        ]


# -- files --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a space's file says of every task, or of one task or family."""

    defaults: Mapping[str, Any] | None = None
    space: Mapping[str, Distribution] | None = None
    when: tuple[Condition, ...] | None = None
    initial_points: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class _File(_Part):
    attention: str
    tasks: Mapping[str, _Part | None] | None = None


def load_space(name: str, task: str) -> SearchSpace:
    """The space called `name` (in search_spaces/) or at that path, with the task's part laid on.

    Raises:
        ConfigError: no such file, unknown keys, malformed distributions.
    """
    path = find_yaml(name, "search_spaces")
    raw = read_yaml(path)
    try:
        return _checked(_for_task(name, from_dict(_File, raw), task))
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def _for_task(name: str, file: _File, task: str) -> SearchSpace:
    tasks = file.tasks or {}
    for key in tasks:
        if key not in task_families():
            task_for(key)
    own: dict[str, Any] = {}
    for part in (tasks.get(task_for(task).family), tasks.get(task)):
        if part is not None:
            own |= {k: v for k, v in vars(part).items() if v is not None}
    space = {**(file.space or {}), **own.get("space", {})}
    return SearchSpace(
        name,
        file.attention,
        defaults=flatten(file.defaults or {}) | flatten(own.get("defaults", {})),
        space=space,
        conditions=_ordered([*(file.when or ()), *own.get("when", ())], set(space)),
        initial_points=tuple(map(flatten, own.get("initial_points", file.initial_points or ()))),
    )


def _ordered(waiting: list[Condition], known: set[str]) -> tuple[Condition, ...]:
    """Each condition after those that search its key, in whatever order the file has them."""
    found = []
    while waiting:
        still_open = {name for c in waiting for name in c.then} - known
        ready = next((c for c in waiting if c.key not in still_open), waiting[0])
        waiting.remove(ready)
        found.append(ready)
    return tuple(found)


def _checked(space: SearchSpace) -> SearchSpace:
    """See that all that conditions and initial points name can be drawn, by one way at a time."""
    names = space.names()
    for key in ("task", "attention", "attention.name"):
        if key in (*space.defaults, *names):
            raise ConfigError(f"{key} is not to be set here; a space is for one of each.")
    # Of a setting: what must hold for it to exist, by distribution; each a list of alternatives.
    ways: dict[str, list[tuple[str, dict[str, Any]]]] = {
        name: [(repr(dist), {})] for name, dist in space.space.items()
    }
    for c in space.conditions:
        if c.key not in ways and c.key not in space.defaults:
            why = f"asks for {c.key}, which is neither searched nor a default"
            if c.key in names:
                why = f"searches {c.key} only where {c.key} has a value"
            raise ConfigError(f"`when` {why}.")
        if c.key in names and not space.holds(c.key, c.value):
            raise ConfigError(f"`when` asks for {c.key}={c.value!r}, which the space cannot yield.")
        before = [{}] if c.key in space.defaults else [w for _, w in ways[c.key]]
        here = [{**w, c.key: c.value} for w in before if w.get(c.key, c.value) == c.value]
        for name, dist in c.then.items():
            for other, there in ways.get(name, []):
                both = any(all(w.get(k, v) == v for k, v in there.items()) for w in here)
                if other != repr(dist) and both:
                    at = " and ".join(f"{k}={v}" for k, v in there.items()) or "every condition"
                    raise ConfigError(
                        f"{name} has two distributions at once, under {c.key}={c.value} and under "
                        f"{at}; give it one for each value of one setting."
                    )
            ways.setdefault(name, []).extend((repr(dist), w) for w in here)
    for point in space.initial_points:
        for key, value in point.items():
            if not space.holds(key, value):
                raise ConfigError(
                    f"initial_points gives {key}={value!r}, which the space cannot yield."
                )
    return space
