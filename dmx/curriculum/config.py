"""What a curriculum consists of, and its file: stages, every value decided and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmx.attention import AttentionConfig
from dmx.config import RunConfig, parse_run_config
from dmx.curriculum.gates.base import AlwaysGate, Gate
from dmx.errors import ConfigError
from dmx.registry import choices_message, find_yaml
from dmx.runs.study import LEAST_FACTOR, SamplerKind, SchedulerKind
from dmx.schema import check_range, expand, flatten, from_dict, join, merge, read_yaml, to_dict
from dmx.search.schedulers import check_population
from dmx.search.space import SearchSpace, load_space
from dmx.tasks import task_for
from dmx.training.checkpoint import meant_checkpoint


@dataclass(frozen=True, kw_only=True)
class OnFail:
    """What happens when the gate says no.

    Attributes:
        action: `stop` ends the run; `retry` trains again with new seeds; `longer` trains on, for
            `factor` times the steps of the attempt before, from its best checkpoint (with
            `afresh`: from where the stage itself starts); `continue` promotes all the same.
        times: how often, for retry and longer.
        then: what follows when they are used up: `stop`, or `continue` with the best attempt.
    """

    action: Literal["stop", "retry", "longer", "continue"] = "stop"
    times: int = 1
    factor: float = 2.0
    afresh: bool = False
    then: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        check_range(self, "times", least=1)
        if not 0.1 <= self.factor <= 100:
            raise ConfigError(f"factor is {self.factor}; it must lie between 0.1 and 100.")

    @classmethod
    def parse(cls, value: object, path: str) -> OnFail:
        """From an action's name or a mapping."""
        return from_dict(cls, {"action": value} if isinstance(value, str) else value, path)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """How missing data are generated; None takes the task's own value (see dmx.data)."""

    num_images: int | None = None
    seed: int | None = None
    render: Literal["original", "lra"] | None = None

    def options(self) -> dict[str, Any]:
        """The values that are set."""
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A stage that is a study; its best trial is promoted.

    Attributes:
        space: a search space's name or path. What it searches wins over the curriculum's values.
        scheduler, sampler: those of `dmx.tune`.
        grace_steps: steps before ASHA or Hyperband may stop a trial, or between two comparisons of
            a population; None takes an eighth of the stage's steps. seed: of the sampler.
    """

    space: str
    num_trials: int = 8
    scheduler: SchedulerKind = "asha"
    sampler: SamplerKind = "tpe"
    grace_steps: int | None = None
    reduction_factor: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "num_trials", "grace_steps", least=1)
        check_range(self, "reduction_factor", least=LEAST_FACTOR)


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What a stage may say beside RunConfig values; `defaults` may say it for all stages.

    Attributes:
        size: of the attention: its `size_field`. init_from: where its weights come from.
        reinit: parameters that may start afresh where shapes differ.
        cpus, gpus: of the stage's run; None lets the caller or the cluster decide.
        workers: processes that share the run's work; None is one for each of its GPUs.
    """

    name: str
    task: str
    size: int | None = None
    seed_data: int | None = None
    seed_model: int | None = None
    init_from: str | None = "previous"
    reinit: tuple[str, ...] = ()
    gate: Gate = field(default_factory=AlwaysGate)
    on_fail: OnFail = field(default_factory=OnFail)
    search: SearchConfig | None = None
    generate: Generate = field(default_factory=Generate)
    cpus: float | None = None
    gpus: float | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "cpus", "gpus", least=0)
        check_range(self, "workers", least=1)
        if not self.name or any(c in self.name for c in "/\\ \t\n") or self.name.startswith("."):
            raise ConfigError(f"name is {self.name!r}; it must be usable as a folder's name.")


@dataclass(frozen=True, kw_only=True)
class StageConfig(StageSettings):
    """One stage, with every value decided.

    Attributes:
        config: what it trains, its size and seeds included.
        parent: the stage whose best checkpoint starts this one, or None.
        init_path: weights on disk that start it (checkpoint folder or .model file), or None.
        space: of a stage that is a search, with what the curriculum fixed already fixed.
        overrides: the values of `config` that its search leaves as they are.
    """

    config: RunConfig
    parent: str | None
    init_path: str | None
    space: SearchSpace | None
    overrides: Mapping[str, Any]

    def training(self) -> dict[str, Any]:
        """Plain values of all that decides what is trained; the same values, the same result."""
        found = {
            **to_dict(self.config),
            "init_from": self.parent or self.init_path,
            "reinit": list(self.reinit),
            "generate": self.generate.options(),
        }
        if self.space is not None:
            space = self.space.plain(self.overrides)
            found |= {"search": to_dict(self.search), "space": space}
        return found

    def judging(self) -> dict[str, Any]:
        """Plain values of what decides whether the result is promoted."""
        return {"gate": self.gate.to_plain(), "on_fail": to_dict(self.on_fail)}

    def brief(self) -> dict[str, Any]:
        """What a report says of a stage that is still to come."""
        facts = {"name": self.name, "task": self.task, "parent": self.parent}
        return {**facts, "attention": self.config.attention.label}

    def plain(self) -> dict[str, Any]:
        """All of it, for curriculum.yaml and the journal."""
        return {"name": self.name, **self.training(), **self.judging()}


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """A chain or a tree of stages, in the file's order; parents stand before their children."""

    name: str
    stages: tuple[StageConfig, ...]

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`."""
        by_name = {stage.name: stage for stage in self.stages}
        if name not in by_name:
            raise ConfigError(f"stage {choices_message(name, by_name)}.")
        return by_name[name]

    def chain(self, name: str) -> tuple[StageConfig, ...]:
        """The stage and its ancestors, the oldest first."""
        stage = self.stage(name)
        above = self.chain(stage.parent) if stage.parent is not None else ()
        return (*above, stage)

    def descendants(self, name: str) -> tuple[str, ...]:
        """The stage and all that start from it, directly or not, in the file's order."""
        wanted = self.stage(name)
        return tuple(s.name for s in self.stages if wanted in self.chain(s.name))

    def until(self, name: str) -> tuple[str, ...]:
        """The stage, and the ones before it in the file."""
        last = self.stages.index(self.stage(name))
        return tuple(s.name for s in self.stages[: last + 1])

    @property
    def last(self) -> StageConfig:
        """The end of the longest chain, the file's first of several: a branch does not take over.

        Its test split is the one that every stage is measured on.
        """
        return max(self.stages, key=lambda s: len(self.chain(s.name)))

    @property
    def leaves(self) -> tuple[str, ...]:
        """Stages from which no other starts."""
        parents = {s.parent for s in self.stages}
        return tuple(s.name for s in self.stages if s.name not in parents)


# -- the file -----------------------------------------------------------------------------------

_SECTIONS = ("attention", "model", "optim", "data", "train")
"""Top-level keys of RunConfig; they may stand in `defaults` and in a stage, nested or dotted."""


@dataclass(frozen=True, kw_only=True)
class _File:
    name: str | None = None
    defaults: Mapping[str, Any] | None = None
    stages: list[Mapping[str, Any]]


def load_curriculum(
    source: str | Path | Mapping[str, Any],
    *,
    attention: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> CurriculumConfig:
    """Read and check a curriculum.

    Args:
        source: a YAML path, the name of a shipped curriculum, or what such a file holds.
        attention: `nystrom`: every stage runs this attention, its size taking the place of the
            file's. `performer-64`: the first stage has size 64, and the others grow as the file's.
        overrides: dotted RunConfig values that win in every stage (`--set`).

    Raises:
        ConfigError: anything unknown, of the wrong type or impossible, with file and dotted path.
    """
    if attention is not None:  # before the file, which would be blamed for it
        AttentionConfig.find(attention)
        AttentionConfig.parse(attention, "attention")
    if isinstance(source, Mapping):
        return _parse(source, "curriculum", attention, overrides or {})
    path = find_yaml(str(source), "curricula")
    try:
        return _parse(read_yaml(path), path.stem, attention, overrides or {})
    except ConfigError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise ConfigError(f"{where}{error}") from None


def _parse(
    raw: Mapping[str, Any], name: str, attention: str | None, overrides: Mapping[str, Any]
) -> CurriculumConfig:
    file = from_dict(_File, raw)
    if not file.stages:
        raise ConfigError("stages must be a list of at least one stage.")
    common, common_run = _split(file.defaults or {}, "defaults")
    for key in ("name", "search"):
        if key in common:
            raise ConfigError(f"defaults.{key} is not allowed; it belongs to a stage.")
    read: list[StageSettings] = []
    runs: list[Mapping[str, Any]] = []
    for number, stage in enumerate(file.stages):
        named = isinstance(stage.get("name"), str)
        where = f"stages.{stage['name']}" if named else f"stages[{number}]"
        own, own_run = _split(stage, where)
        own.setdefault("name", own.get("task", common.get("task")))
        read.append(from_dict(StageSettings, {**common, **own}, where))
        runs.append(merge(common_run, own_run))
    starts = [_start(number, read) for number in range(len(read))]
    order = _parents_first({s.name: parent for s, (parent, _) in zip(read, starts, strict=True)})
    sizes = _sizes(read, attention)
    built = {
        keys.name: _build(dataclasses.replace(keys, size=size), run, start, attention, overrides)
        for keys, run, start, size in zip(read, runs, starts, sizes, strict=True)
    }
    stages = tuple(built[stage] for stage in order)
    return CurriculumConfig(name=file.name or name, stages=stages)


def _split(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage's own keys, and the RunConfig values."""
    own: dict[str, Any] = {}
    run: dict[str, Any] = {}
    known = {f.name for f in dataclasses.fields(StageSettings)}
    for key, value in raw.items():
        if str(key).split(".")[0] in _SECTIONS:
            run[key] = value
        elif key in known:
            own[key] = value
        else:
            problem = choices_message(key, [*known, *_SECTIONS]).replace(" is unknown", "", 1)
            raise ConfigError(f"{join(where, str(key))} is not a setting; {problem}.")
    if isinstance(run.get("attention"), str):
        run["attention"] = {"name": run["attention"]}
    return own, run


def _start(number: int, stages: Sequence[StageSettings]) -> tuple[str | None, str | None]:
    """(parent stage, path on disk) of a stage."""
    stage, names = stages[number], [s.name for s in stages]
    where, source = f"stages.{stage.name}", stage.init_from
    if names.count(stage.name) > 1:
        raise ConfigError(f"{where}: the name stands for two stages; names must differ.")
    if source == "previous":
        return (names[number - 1] if number else None), None
    if source is None or source == "none":
        return None, None
    if source in names:
        return source, None
    if "/" not in source and not source.endswith(".model") and not source.startswith("~"):
        raise ConfigError(
            f"{where}.init_from: stage {choices_message(source, [*names, 'previous', 'none'])}"
            "; a path must hold a `/`."
        )
    source = expand(f"{where}.init_from", source)
    if not Path(source).exists():
        raise ConfigError(f"{where}.init_from: {source} does not exist.")
    return None, str(meant_checkpoint(Path(source).absolute()))


def _parents_first(parents: Mapping[str, str | None]) -> list[str]:
    """The file's order, but a stage that starts from a later one comes after it."""
    order: list[str] = []

    def place(name: str | None, below: tuple[str, ...]) -> None:
        if name in below:
            circle = " <- ".join([*below[below.index(name) :], name])
            raise ConfigError(f"stages.{name}.init_from: stages start from each other: {circle}.")
        if name is not None and name not in order:
            place(parents[name], (*below, name))
            order.append(name)

    for name in parents:
        place(name, ())
    return order


def _sizes(stages: Sequence[StageSettings], attention: str | None) -> list[int | None]:
    """The attention's size in each stage."""
    given = [s.size for s in stages]
    named = {} if attention is None else AttentionConfig.find(attention)[1]
    base = next((size for size in given if size is not None), None)
    if not named:
        return given
    (first,) = named.values()
    if base is None:
        return [first for _ in given]
    for stage in stages:
        if stage.size is not None and (stage.size * first) % base:
            raise ConfigError(
                f"stages.{stage.name}.size: {first} * {stage.size} / {base} is not a whole number; "
                f"choose another first size than {attention}."
            )
    return [None if size is None else size * first // base for size in given]


def _build(
    keys: StageSettings,
    run: Mapping[str, Any],
    start: tuple[str | None, str | None],
    attention: str | None,
    overrides: Mapping[str, Any],
) -> StageConfig:
    where = f"stages.{keys.name}"
    try:
        config = _run_config(keys, run, attention, overrides)
        space, fixed = _space(keys, config, overrides)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if keys.generate.options() and not task_for(keys.task).generated:
        raise ConfigError(f"{where}.generate: task {keys.task} cannot be generated.")
    return StageConfig(
        **vars(keys),
        config=config,
        parent=start[0],
        init_path=start[1],
        space=space,
        overrides=fixed,
    )


def _run_config(
    keys: StageSettings,
    run: Mapping[str, Any],
    attention: str | None,
    overrides: Mapping[str, Any],
) -> RunConfig:
    seeds = {"data.seed": keys.seed_data, "train.seed": keys.seed_model}
    fixed = {path: seed for path, seed in seeds.items() if seed is not None}
    layers = [{"attention.name": "butterfly"}, {"task": keys.task}, run, fixed]
    if attention is not None:
        layers.append({"attention.name": AttentionConfig.find(attention)[0].name})
    chosen = overrides.get("attention", overrides.get("attention.name"))
    if isinstance(chosen, str):
        layers.append({"attention.name": chosen})
    if keys.size is not None:
        named = merge(*layers)["attention"]["name"]
        size_field = AttentionConfig.parse({"name": named}, "attention").size_field
        if size_field is not None:
            layers.append({f"attention.{size_field}": keys.size})
    config = parse_run_config(*layers, overrides)
    if config.data.root is not None:
        raise ConfigError("data.root is not allowed in a curriculum; pass --data-root.")
    return config


def _space(
    keys: StageSettings, config: RunConfig, overrides: Mapping[str, Any]
) -> tuple[SearchSpace | None, dict[str, Any]]:
    """The space of a search stage without what `--set` fixed, and the values it does not search."""
    if keys.search is None:
        return None, {}
    space = load_space(keys.search.space, keys.task)
    if space.attention != config.attention.name:
        raise ConfigError(
            f"search.space {keys.search.space} is for attention {space.attention}, but the stage "
            f"runs {config.attention.name}."
        )
    space = space.without(overrides)
    searched = space.names()
    fixed = {k: v for k, v in flatten(to_dict(config)).items() if k not in searched and k != "task"}
    space.check(keys.task, fixed)
    if keys.search.scheduler == "pbt":
        check_population(space, keys.search.num_trials)
    from dmx.search.samplers import check_sampler  # imports Optuna, which few curricula need

    check_sampler(keys.search.sampler, space)
    return space, fixed
