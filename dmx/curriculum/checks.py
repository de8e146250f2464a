"""What can be wrong with a curriculum, found before a cluster or GPU is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dmx.config import RunConfig
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.data.prepare import is_prepared, prepare_command
from dmx.data.store import Store, open_store
from dmx.errors import CheckpointError, ConfigError, DataError, StageError
from dmx.runs import layout
from dmx.runs.layout import DEV_ACCURACY, STEPS, attempt_folder
from dmx.runs.stages import History, Stage
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


def find_data(stage: StageConfig, root: Path) -> Store | None:
    """The stage's prepared data, or None while they are still to be generated.

    Raises:
        DataError: they are neither there nor can dmx generate them; or what is there was generated
            with other settings than the stage's.
    """
    task = stage.config.task_info
    if not is_prepared(task.name, root):
        if task.generated:
            return None
        raise DataError(
            f"stage {stage.name}: task {task.name} has no prepared data in {root / task.name}; "
            f"run: {prepare_command(task.name, root)}"
        )
    store = open_store(root / task.name)
    check_settings(stage, store)
    return store


def check_settings(stage: StageConfig, store: Store) -> None:
    """Refuse a generated store whose settings are not the stage's."""
    manifest, wanted = store.manifest, stage.generate.options()
    if not manifest.data_name.startswith("generated"):
        return  # the published data; `generate` says what to do without them
    for name, value in wanted.items():
        found = manifest.parameters.get(name)
        if found != value:
            raise DataError(
                f"stage {stage.name} wants generate.{name} {value}, but {store.folder} was "
                f"generated with {found}; change the stage, give another --data-root, or run: "
                f"{prepare_command(manifest.task, store.folder.parent)} "
                f"--{name.replace('_', '-')} {value} --force"
            )


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
    """What every stage takes over from where it starts, by stage; stages from nothing are left out.

    Raises:
        CheckpointError: shapes that cannot transfer, or a damaged file to start from.
    """
    known = {s.name: list(_variants(s, data[s.name])) for s in curriculum.stages}
    reports = {}
    tasks: tuple[Task | None, Task]
    for stage in curriculum.stages:
        if stage.init_path is not None:
            weights = read_weights(Path(stage.init_path))
            sources: list[Shapes] = [weights.shapes]
            tasks = (weights.task, stage.config.task_info)
        elif stage.parent is not None:
            sources = known[stage.parent]
            tasks = (curriculum.stage(stage.parent).config.task_info, stage.config.task_info)
        else:
            continue
        targets = known[stage.name]
        origin = stage.parent or stage.init_path
        try:
            check_reinit(stage.reinit, [name for some in (*sources, *targets) for name in some])
            for source in sources:
                for target in targets:
                    reports[stage.name] = plan_transfer(source, target, stage.reinit, tasks=tasks)
        except CheckpointError as error:
            raise CheckpointError(f"stage {stage.name} from {origin}: {error}") from None
    return reports


def check_checkpoints(
    curriculum: CurriculumConfig, history: History, run_folder: Path, selected: Collection[str]
) -> None:
    """Every checkpoint that this session will need is there, whole, and the one of the journal.

    Raises:
        CheckpointError: names the folder and the remedy.
    """
    for stage in curriculum.stages:
        state = history.stage(stage.name)
        if state.promoted is not None:
            check_promoted(stage.name, state.promoted, run_folder)
        elif state.current is not None and state.current.decision is None:
            _check_last(stage, attempt_folder(run_folder, stage.name, state.current.number))
        elif state.status == "running" and stage.name in selected and state.current is not None:
            decision = state.current.decision or {}
            if decision.get("checkpoint") is not None:
                check_promoted(stage.name, decision["checkpoint"], run_folder)


def check_promoted(stage: str, promoted: Mapping[str, Any], run_folder: Path) -> Path:
    """The folder of a promoted checkpoint, found unchanged.

    Raises:
        CheckpointError: it is missing, damaged or edited.
    """
    folder = run_folder / promoted["path"]
    remedy = f"restore it, or train the stage again with --from-stage {stage}"
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; {remedy}.") from None
    if sha256_file(folder / layout.MODEL_FILE) != promoted["sha256"]:
        raise CheckpointError(
            f"{folder / layout.MODEL_FILE} is damaged or was edited after stage {stage} ended; "
            f"{remedy}."
        )
    return folder


def _check_last(stage: StageConfig, folder: Path) -> None:
    last = folder / layout.LAST_DIR
    if stage.search is not None:
        return  # the study checks its own trials
    if not is_there(last):
        return  # stopped before its first evaluation
    try:
        checkpoint = open_checkpoint(last)
        checkpoint.model_state()
        checkpoint.training_state()
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).rstrip('.')}; restore it, or train the stage again with --from-stage "
            f"{stage.name}."
        ) from None


def check_device(curriculum: CurriculumConfig, *, local: bool) -> None:
    """The device that a stage insists on is there; on a cluster only the worker can know.

    Raises:
        ConfigError: it is not.
    """
    for stage in curriculum.stages if local else ():
        try:
            trainer.pick_device(stage.config.train.device)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None


def best_checkpoints(folder: Path, stage: str, state: Stage) -> dict[int, dict[str, Any]]:
    """The best checkpoint of each attempt that has one, as the journal names it.

    Its path is relative to the run's folder, which may move.
    """
    found = {}
    for attempt in state.attempts:
        path = attempt_folder(folder, stage, attempt.number) / layout.BEST_DIR
        try:
            metrics = open_checkpoint(path).metrics
        except CheckpointError:
            continue
        found[attempt.number] = {
            "stage": stage,
            "attempt": attempt.number,
            "path": str(path.relative_to(folder)),
            "step": int(metrics.get(STEPS, 0)),
            DEV_ACCURACY: metrics.get(DEV_ACCURACY),
        }
    return found


def with_checksum(folder: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the checksum of its weights."""
    model = folder / checkpoint["path"] / layout.MODEL_FILE
    return {**checkpoint, "sha256": sha256_file(model)}


def data_facts(store: Store) -> dict[str, Any]:
    """Which data an attempt saw."""
    manifest = store.manifest
    return {
        "label": manifest.label,
        "folder": str(store.folder),
        "checksum": manifest.checksum,
        "origin": manifest.origin,
        "splits": dict(manifest.splits),
        "is_sample": manifest.is_sample,
    }


def check_unchanged(curriculum: CurriculumConfig, history: History) -> None:
    """Refuse to continue a run whose file says something else than what was trained.

    A gate may change while its decision is still open, or was a refusal.

    Raises:
        StageError: with every difference, and the remedy.
    """
    names = {s.name for s in curriculum.stages}
    for name, state in history.stages.items():
        if not state.attempts:
            continue
        if name not in names:
            raise StageError(
                f"stage {name} was trained in this run but is not in the file any more; put it "
                "back, or start another run with --name."
            )
        stage = curriculum.stage(name)
        changed = _differences(state.attempts[0].spec, stage.training(), _NOT_TRAINING)
        if state.status == "passed":
            changed += _differences(state.attempts[-1].judging, stage.judging(), ())
        if changed:
            done = "finished" if state.status == "passed" else "begun"
            raise StageError(
                f"stage {name} was edited after it was {done} ({'; '.join(changed)}); undo that, "
                f"or train it and what follows again with --from-stage {name}."
            )


_NOT_TRAINING = ("name", "gate", "on_fail", "code")


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str]
) -> list[str]:
    before = flatten({k: v for k, v in old.items() if k not in ignored})
    after = flatten({k: v for k, v in new.items() if k not in ignored})
    keys = [*before, *(k for k in after if k not in before)]
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]
