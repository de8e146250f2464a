"""What can be wrong with a curriculum, found before a cluster or GPU is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dmx.config import RunConfig
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.data.prepare import is_prepared, prepare_command
from dmx.data.store import Store, open_store
from dmx.errors import CheckpointError, DataError, StageError
from dmx.runs import layout
from dmx.runs.curriculum import Stage
from dmx.runs.layout import DEV_ACCURACY, STEPS, attempt_folder
from dmx.schema import flatten
from dmx.storage.files import is_there, sha256_file
from dmx.tasks import Task
from dmx.training import trainer
from dmx.training.checkpoint import open_checkpoint
from dmx.training.transfer import (
    Shapes,
    TransferReport,
    check_reinit,
    plan_transfer,
    read_weights,
    shapes_of,
)

_MAX_VARIANTS = 64

# -- its data -----------------------------------------------------------------------------------


def find_data(stage: StageConfig, root: Path, store: Store | None = None) -> Store | None:
    """The stage's prepared data, or None while they are still to be generated.

    Args:
        store: the data, where they are open already.

    Raises:
        DataError: they are neither there nor can dmx generate them; or what is there was generated
            with other settings than the stage's.
    """
    task = stage.config.task_info
    if store is None and is_prepared(task.name, root):
        store = open_store(root / task.name)
    if store is None:
        if task.generated:
            return None
        raise DataError(
            f"stage {stage.name}: task {task.name} has no prepared data in {root / task.name}; "
            f"run: {prepare_command(task.name, root)}"
        )
    manifest = store.manifest
    # Of the published data `generate` only says what to do without them.
    wanted = stage.generate.options() if manifest.data_name.startswith("generated") else {}
    for name, value in wanted.items():
        found = manifest.parameters.get(name)
        if found != value:
            raise DataError(
                f"stage {stage.name} wants generate.{name} {value}, but {store.folder} was "
                f"generated with {found}; change the stage, give another --data-root, or run: "
                f"{prepare_command(manifest.task, root)} --{name.replace('_', '-')} {value} --force"
            )
    return store


def data_facts(store: Store) -> dict[str, Any]:
    """Which data an attempt saw."""
    manifest = store.manifest
    facts = {name: getattr(manifest, name) for name in ("label", "checksum", "origin", "is_sample")}
    return {**facts, "folder": str(store.folder), "splits": dict(manifest.splits)}


# -- weights that move from stage to stage ------------------------------------------------------


def resolve(config: RunConfig, store: Store | None) -> RunConfig:
    """The config with the model's open sizes from the data, or from the task without data."""
    if store is not None:
        return trainer.resolve(config, store.manifest)
    task = config.task_info
    return config.resolved(vocab_size=task.vocab_size, num_classes=task.num_classes)


def _variants(stage: StageConfig, store: Store | None) -> Iterator[Shapes]:
    """The shapes that the stage may have: one, or as many as its search can choose."""
    if stage.space is None:
        yield shapes_of(resolve(stage.config, store))
        return
    seen: list[Shapes] = []
    for corner in stage.space.corners(_MAX_VARIANTS):
        config = stage.space.run_config(stage.task, stage.overrides, corner)
        shapes = shapes_of(resolve(config, store))
        if shapes not in seen:
            seen.append(shapes)
            yield shapes


def check_transfers(
    curriculum: CurriculumConfig, data: Mapping[str, Store | None]
) -> dict[str, TransferReport]:
    """What every stage takes over from where it starts, by stage; none of those from nothing."""
    known = {s.name: list(_variants(s, data[s.name])) for s in curriculum.stages}
    reports = {}
    for stage in curriculum.stages:
        before: Task | None
        if stage.init_path is not None:
            weights = read_weights(Path(stage.init_path))
            sources, before = [weights.shapes], weights.task
        elif stage.parent is not None:
            sources = known[stage.parent]
            before = curriculum.stage(stage.parent).config.task_info
        else:
            continue
        targets, tasks = known[stage.name], (before, stage.config.task_info)
        try:
            check_reinit(stage.reinit, [name for some in (*sources, *targets) for name in some])
            for source in sources:
                for target in targets:
                    reports[stage.name] = plan_transfer(source, target, stage.reinit, tasks=tasks)
        except CheckpointError as error:
            origin = stage.parent or stage.init_path
            raise CheckpointError(f"stage {stage.name} from {origin}: {error}") from None
    return reports


# -- checkpoints --------------------------------------------------------------------------------


def check_checkpoints(stages: Iterable[Stage], selected: Collection[str]) -> None:
    """Every checkpoint that a session will need is there, whole, and the one of the journal."""
    for stage in stages:
        current = stage.current
        if stage.promoted is not None:
            check_promoted(stage, stage.promoted)
        elif current is not None and not current.decision:
            if "search" not in current.spec:  # a study checks its own trials
                _check_last(stage, current.number)
        elif current is not None and stage.status == "running" and stage.name in selected:
            judged = current.decision["checkpoint"]  # a longer attempt may start from it
            if judged is not None:
                check_promoted(stage, judged)


def check_promoted(stage: Stage, promoted: Mapping[str, Any]) -> Path:
    """The folder of a checkpoint of the stage's, found unchanged."""
    folder = stage.folder / promoted["path"]
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        raise _lost(stage, str(error)) from None
    model = folder / layout.MODEL_FILE
    if sha256_file(model) != promoted["sha256"]:
        raise _lost(stage, f"{model} is damaged or was edited after stage {stage.name} ended")
    return folder


def _check_last(stage: Stage, attempt: int) -> None:
    last = attempt_folder(stage.folder, stage.name, attempt) / layout.LAST_DIR
    if not is_there(last):
        return  # stopped before its first evaluation
    try:
        checkpoint = open_checkpoint(last)
        checkpoint.model_state()
        checkpoint.training_state()
    except CheckpointError as error:
        raise _lost(stage, str(error)) from None


def _lost(stage: Stage, why: str) -> CheckpointError:
    return CheckpointError(
        f"{why.rstrip('.')}; restore it, or train the stage again with --from-stage {stage.name}."
    )


def best_checkpoints(stage: Stage) -> dict[int, dict[str, Any]]:
    """The best checkpoint of each attempt that has one, as the journal names it.

    Its path is relative to the run's folder, which may move.
    """
    found = {}
    for attempt in stage.attempts:
        path = attempt_folder(stage.folder, stage.name, attempt.number) / layout.BEST_DIR
        try:
            metrics = open_checkpoint(path).metrics
        except CheckpointError:
            continue
        found[attempt.number] = {
            "stage": stage.name,
            "attempt": attempt.number,
            "path": str(path.relative_to(stage.folder)),
            "step": int(metrics.get(STEPS, 0)),
            DEV_ACCURACY: metrics.get(DEV_ACCURACY),
        }
    return found


# -- a file that was edited ---------------------------------------------------------------------


def check_unchanged(curriculum: CurriculumConfig, stages: Iterable[Stage]) -> None:
    """Refuse to continue stages of which the file says something else than what was trained.

    A gate may change while its decision is still open, or was a refusal.
    """
    by_name = {s.name: s for s in curriculum.stages}
    for state in stages:
        if not state.attempts:
            continue
        name, stage, done = state.name, by_name.get(state.name), state.status == "passed"
        if stage is None:
            raise StageError(
                f"stage {name} was trained in this run but is not in the file any more; put it "
                "back, or start another run with --name."
            )
        spec = {k: v for k, v in state.attempts[0].spec.items() if k not in _NOT_TRAINING}
        changed = _differences(spec, stage.training())
        if done:
            changed += _differences(state.attempts[-1].judging, stage.judging())
        if changed:
            raise StageError(
                f"stage {name} was edited after it was {'finished' if done else 'begun'} "
                f"({'; '.join(changed)}); undo that, or train it and what follows again with "
                f"--from-stage {name}."
            )


_NOT_TRAINING = ("name", "gate", "on_fail", "code")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
