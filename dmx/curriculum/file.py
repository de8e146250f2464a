"""Curriculum files: YAML -> a CurriculumConfig, with dotted paths in every error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.attention import AttentionConfig
from dmx.attention.base import split_name
from dmx.config import RunConfig, parse_run_config
from dmx.curriculum.order import StageKeys, parents, parents_first, sizes
from dmx.curriculum.stages import CurriculumConfig, StageConfig
from dmx.errors import ConfigError
from dmx.overrides import flatten, merge
from dmx.registry import choices_message
from dmx.schema import from_dict, join, read_yaml, to_dict
from dmx.search.population import check_population
from dmx.search.space import SearchSpace
from dmx.search.space_file import load_space
from dmx.tasks import task_for

SECTIONS = ("attention", "model", "optim", "data", "train")
"""Top-level keys of RunConfig; they may stand in `defaults` and in a stage, nested or dotted."""


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
    if attention is not None:  # before the file, which would be blamed for it
        split_name(attention)
        AttentionConfig.parse(attention, "attention")
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
    starts = parents([keys for keys, _ in read])
    grown = sizes([keys for keys, _ in read], attention)
    built = [
        _build(keys, run, starts[i], grown[i], attention, overrides or {})
        for i, (keys, run) in enumerate(read)
    ]
    return CurriculumConfig(name=name, stages=tuple(parents_first(built)))


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
        workers=keys.workers,
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
    searched = space.names()
    fixed = {k: v for k, v in flatten(to_dict(config)).items() if k not in searched and k != "task"}
    space.check(keys.task, fixed)
    if keys.search.scheduler == "pbt":
        check_population(space, keys.search.num_trials)
    from dmx.search.sampling import check_sampler  # imports Optuna, which few curricula need

    check_sampler(keys.search.sampler, space)
    return space, fixed
