"""What the stages of a file say of each other: where each starts from, and how sizes grow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dmx.attention.base import split_name
from dmx.curriculum.stages import Generate, OnFail, SearchConfig, StageConfig
from dmx.errors import ConfigError
from dmx.gates import Gate
from dmx.gates.standard import AlwaysGate
from dmx.paths import expand
from dmx.registry import choices_message
from dmx.training.checkpoint import meant_checkpoint


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
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value:g}; it must not be negative.")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; it must be at least 1.")
        if not self.name or any(c in self.name for c in "/\\ \t\n") or self.name.startswith("."):
            raise ConfigError(f"name is {self.name!r}; it must be usable as a folder's name.")


def parents(stages: list[StageKeys]) -> list[tuple[str | None, str | None]]:
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
        elif "/" in source or source.endswith(".model") or source.startswith("~"):
            source = expand(f"{where}.init_from", source)
            if not Path(source).exists():
                raise ConfigError(f"{where}.init_from: {source} does not exist.")
            found.append((None, str(meant_checkpoint(Path(source).absolute()))))
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


def parents_first(stages: list[StageConfig]) -> list[StageConfig]:
    """The file's order, but a stage that starts from a later one comes after it."""
    done: list[StageConfig] = []
    while len(done) < len(stages):
        names = {s.name for s in done}
        done.append(
            next(s for s in stages if s not in done and (s.parent is None or s.parent in names))
        )
    return done


def sizes(stages: list[StageKeys], attention: str | None) -> list[int | None]:
    """The attention's size in each stage."""
    given = [s.size for s in stages]
    if attention is None:
        return given
    _, first = split_name(attention)
    if first is None:
        return given
    base = next((s for s in given if s is not None), None)
    if base is None:
        return [first for _ in given]
    grown = []
    for stage, size in zip(stages, given, strict=True):
        if size is not None and (size * first) % base:
            raise ConfigError(
                f"stages.{stage.name}.size: {first} * {size} / {base} is not a whole number; "
                f"choose another first size than {attention}."
            )
        grown.append(None if size is None else size * first // base)
    return grown
