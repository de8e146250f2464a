"""Curriculum files: YAML -> a CurriculumConfig, with dotted paths in every error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmx.attention import AttentionConfig
from dmx.attention.base import split_name
from dmx.config import RunConfig, parse_run_config
from dmx.errors import ConfigError
from dmx.gates import AlwaysGate, Gate
from dmx.overrides import flatten, merge
from dmx.registry import choices_message
from dmx.schema import from_dict, join, read_yaml, to_dict
from dmx.space import SearchSpace, load_space
from dmx.stages import CurriculumConfig, Generate, OnFail, SearchConfig, StageConfig
from dmx.tasks import task_for

SECTIONS = ("attention", "model", "optim", "data", "train")
"""Top-level keys of RunConfig; they may stand in `defaults` and in a stage, nested or dotted."""


@dataclass(frozen=True, kw_only=True)
class StageKeys:
    """What a stage may say beside RunConfig values; `defaults` may say it for all stages."""

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

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value:g}; it must not be negative.")
        if not self.name or any(c in self.name for c in "/\\ \t\n") or self.name.startswith("."):
            raise ConfigError(f"name is {self.name!r}; it must be usable as a folder's name.")


def load_curriculum(
    path: Path, *, attention: str | None = None, overrides: Mapping[str, Any] | None = None
) -> CurriculumConfig:
    """Read and check a curriculum.

    Args:
        path: the YAML file.
        attention: `nystrom`: every stage runs this attention, its size taking the place of the
            file's. `performer-64`: the first stage has size 64, and the others grow as the file's.
        overrides: dotted RunConfig values that win in every stage (`--set`).

    Raises:
        ConfigError: anything unknown, of the wrong type or impossible, with file and dotted path.
    """
    try:
        return parse_curriculum(read_yaml(path), path.stem, attention, overrides or {})
    except ConfigError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise ConfigError(f"{where}{error}") from None


def parse_curriculum(
    raw: Mapping[str, Any],
    default_name: str,
    attention: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> CurriculumConfig:
    """The curriculum in a plain mapping; see load_curriculum."""
    for key in raw:
        if key not in ("name", "defaults", "stages"):
            raise ConfigError(f"{key} is not a setting; allowed: name, defaults, stages.")
    name = raw.get("name", default_name)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name must be text, not {name!r}.")
    defaults, stages = raw.get("defaults") or {}, raw.get("stages")
    if not isinstance(defaults, Mapping):
        raise ConfigError(f"defaults must be a mapping, not {defaults!r}.")
    if not isinstance(stages, list) or not stages:
        raise ConfigError("stages must be a list of at least one stage.")
    common, common_run = _split(defaults, "defaults")
    for key in ("name", "search"):
        if key in common:
            raise ConfigError(f"defaults.{key} is not allowed; it belongs to a stage.")
    read: list[tuple[StageKeys, dict[str, Any]]] = []
    for number, stage in enumerate(stages):
        where = f"stages[{number}]"
        if not isinstance(stage, Mapping):
            raise ConfigError(f"{where} must be a mapping, not {stage!r}.")
        if isinstance(stage.get("name"), str):
            where = f"stages.{stage['name']}"
        own, own_run = _split(stage, where)
        own.setdefault("name", own.get("task", common.get("task")))
        keys = from_dict(StageKeys, {**common, **own}, where)
        read.append((keys, merge(common_run, own_run)))
    parents = _parents([keys for keys, _ in read])
    sizes = _sizes([keys for keys, _ in read], attention)
    built = [
        _build(keys, run, parents[i], sizes[i], attention, overrides or {})
        for i, (keys, run) in enumerate(read)
    ]
    return CurriculumConfig(name=name, stages=tuple(_parents_first(built)))


def _split(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage's own keys, and the RunConfig values."""
    own: dict[str, Any] = {}
    run: dict[str, Any] = {}
    known = {f.name for f in dataclasses.fields(StageKeys)}
    for key, value in raw.items():
        if str(key).split(".")[0] in SECTIONS:
            run[key] = value
        elif key in known:
            own[key] = value
        else:
            problem = choices_message(key, [*known, *SECTIONS]).replace(" is unknown", "", 1)
            raise ConfigError(f"{join(where, str(key))} is not a setting; {problem}.")
    if isinstance(run.get("attention"), str):
        run["attention"] = {"name": run["attention"]}
    return own, run


def _parents(stages: list[StageKeys]) -> list[tuple[str | None, str | None]]:
    """(parent stage, path on disk) of each stage."""
    names = [s.name for s in stages]
    found: list[tuple[str | None, str | None]] = []
    for number, stage in enumerate(stages):
        where = f"stages.{stage.name}"
        if names.count(stage.name) > 1:
            raise ConfigError(f"{where}: the name stands for two stages; names must differ.")
        source = stage.init_from
        if source == "previous":
            found.append((names[number - 1] if number else None, None))
        elif source is None or source == "none":
            found.append((None, None))
        elif source in names:
            found.append((source, None))
        elif "/" in source or source.endswith(".model"):
            if not Path(source).exists():
                raise ConfigError(f"{where}.init_from: {source} does not exist.")
            found.append((None, str(Path(source).absolute())))
        else:
            raise ConfigError(
                f"{where}.init_from: stage {choices_message(source, [*names, 'previous', 'none'])}"
                "; a path must hold a `/`."
            )
    by_name = {name: parent for name, (parent, _) in zip(names, found, strict=True)}
    for name in names:
        seen, node = [name], by_name[name]
        while node is not None:
            if node in seen:
                circle = " <- ".join([*seen[seen.index(node) :], node])
                raise ConfigError(
                    f"stages.{node}.init_from: stages start from each other: {circle}."
                )
            seen.append(node)
            node = by_name[node]
    return found


def _parents_first(stages: list[StageConfig]) -> list[StageConfig]:
    """The file's order, but a stage that starts from a later one comes after it."""
    done: list[StageConfig] = []
    while len(done) < len(stages):
        names = {s.name for s in done}
        done.append(
            next(s for s in stages if s not in done and (s.parent is None or s.parent in names))
        )
    return done


def _sizes(stages: list[StageKeys], attention: str | None) -> list[int | None]:
    """The attention's size in each stage."""
    sizes = [s.size for s in stages]
    if attention is None:
        return sizes
    _, first = split_name(attention)
    if first is None:
        return sizes
    base = next((s for s in sizes if s is not None), None)
    if base is None:
        return [first for _ in sizes]
    grown = []
    for stage, size in zip(stages, sizes, strict=True):
        if size is not None and (size * first) % base:
            raise ConfigError(
                f"stages.{stage.name}.size: {first} * {size} / {base} is not a whole number; "
                f"choose another first size than {attention}."
            )
        grown.append(None if size is None else size * first // base)
    return grown


def _build(
    keys: StageKeys,
    run: Mapping[str, Any],
    parent: tuple[str | None, str | None],
    size: int | None,
    attention: str | None,
    overrides: Mapping[str, Any],
) -> StageConfig:
    where = f"stages.{keys.name}"
    try:
        config = _run_config(keys, run, size, attention, overrides)
        space, fixed = _space(keys, config, overrides)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if keys.generate.options() and not task_for(keys.task).generated:
        raise ConfigError(f"{where}.generate: task {keys.task} cannot be generated.")
    return StageConfig(
        name=keys.name,
        config=config,
        parent=parent[0],
        init_path=parent[1],
        reinit=keys.reinit,
        gate=keys.gate,
        on_fail=keys.on_fail,
        search=keys.search,
        space=space,
        overrides=fixed,
        generate=keys.generate,
        cpus=keys.cpus,
        gpus=keys.gpus,
    )


def _run_config(
    keys: StageKeys,
    run: Mapping[str, Any],
    size: int | None,
    attention: str | None,
    overrides: Mapping[str, Any],
) -> RunConfig:
    layers: list[Mapping[str, Any]] = [{"task": keys.task}, run]
    for path, value in (("data.seed", keys.seed_data), ("train.seed", keys.seed_model)):
        if value is not None:
            layers.append({path: value})
    if attention is not None:
        layers.append({"attention.name": split_name(attention)[0].name})
    chosen = overrides.get("attention", overrides.get("attention.name"))
    if isinstance(chosen, str):
        layers.append({"attention.name": chosen})
    if size is not None:
        field_name = _size_field(layers)
        if field_name is not None:
            layers.append({f"attention.{field_name}": size})
    config = parse_run_config(*layers, overrides)
    if config.data.root is not None:
        raise ConfigError("data.root is not allowed in a curriculum; pass --data-root.")
    return config


def _size_field(layers: list[Mapping[str, Any]]) -> str | None:
    """The size field of the attention that the layers name; None for one without a size."""
    merged = merge({"attention.name": "butterfly"}, *layers).get("attention")
    config = AttentionConfig.parse({"name": merged["name"]} if merged else "butterfly", "attention")
    return config.size_field


def _space(
    keys: StageKeys, config: RunConfig, overrides: Mapping[str, Any]
) -> tuple[SearchSpace | None, dict[str, Any]]:
    """The space of a search stage without what `--set` fixed, and the values it does not search."""
    if keys.search is None:
        return None, {}
    space = load_space(keys.search.space, keys.task, task_for(keys.task).family)
    if space.attention != config.attention.name:
        raise ConfigError(
            f"search.space {keys.search.space} is for attention {space.attention}, but the stage "
            f"runs {config.attention.name}."
        )
    space = space.without(overrides)
    searched = space.distributions()
    fixed = {k: v for k, v in flatten(to_dict(config)).items() if k not in searched and k != "task"}
    space.check(keys.task, fixed)
    return space, fixed
