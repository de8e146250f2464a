"""A curriculum on the tiny data, and a backend that follows a script instead of training."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dmx.cluster.capacity import Resources
from dmx.config import parse_run_config
from dmx.curriculum.config import CurriculumConfig, load_curriculum
from dmx.curriculum.controller import Controller, CurriculumLog, Key, Message
from dmx.curriculum.planner import ResourcePlan
from dmx.runs import layout
from dmx.runs.curriculum import Curriculum
from dmx.runs.layout import (
    BEST_DEV_ACCURACY,
    BEST_STEP,
    DEV_ACCURACY,
    STEP_SECONDS,
    STEPS,
    TRAIN_LOSS,
    TRAIN_SECONDS,
)
from dmx.training.checkpoint import save_checkpoint
from dmx.training.evaluation import EvaluationJob
from dmx.training.job import Job
from tests.tiny import SETTINGS, TASK, write_tiny

OTHER_TASK = "pathfinder16-cl2-d0"
LATE_TASK = "pathfinder16-cl4-d0"


def file(*stages: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Stages on the tiny task; each mapping lies over the tiny settings."""
    shared = {"task": TASK, "cpus": 1, **SETTINGS, **defaults}
    return {"name": "test", "defaults": shared, "stages": list(stages)}


def chain_file(**changes: Mapping[str, Any]) -> dict[str, Any]:
    """Three stages a -> b -> c on three tasks; `b={...}` changes one of them."""
    tasks = {"a": TASK, "b": OTHER_TASK, "c": LATE_TASK}
    return file(*({"name": n, "task": t, **changes.get(n, {})} for n, t in tasks.items()))


def curriculum(*stages: Mapping[str, Any], **defaults: Any) -> CurriculumConfig:
    return load_curriculum(file(*stages, **defaults))


def chain(**changes: Mapping[str, Any]) -> CurriculumConfig:
    return load_curriculum(chain_file(**changes))


class Crash(Exception):
    """The power cut."""


class CrashingLog(CurriculumLog):
    """A record whose process dies right after its n-th line of this session."""

    def __init__(self, folder: Path, lines: int) -> None:
        super().__init__(folder)
        self._left = lines

    def record(self, event: str, **values: Any) -> None:
        super().record(event, **values)
        self._left -= 1
        if self._left == 0:
            raise Crash


class FakeBackend:
    """Runs whose dev accuracies are scripted by stage and attempt; "best" and "last" are written.

    A run that was reported up to some step on disk goes on from there, as a real one does.

    Args:
        script: stage -> one list of accuracies per attempt; a text ends an attempt as a failure;
            "lost" means that its machine failed.
        root: where data are "prepared".
    """

    def __init__(self, script: Mapping[str, list[list[float | str]]], root: Path) -> None:
        self.script, self.root = script, root
        self.queue: list[Message] = []
        self.running: dict[Key, tuple[Job, list[float | str]]] = {}
        self.trained: list[tuple[str, int]] = []
        self.steps_trained: dict[str, int] = {}
        self.at_once = 0
        self.jobs: dict[str, Job] = {}
        self.prepared: list[tuple[str, bool, int, int]] = []
        self.tested: list[tuple[str, str]] = []

    def train(self, key: Key, job: Job) -> None:
        number = int(Path(job.folder).name.removeprefix("attempt-"))
        self.trained.append((key.stage, number))
        self.jobs[f"{key.stage}-{number}"] = job
        self.running[key] = (job, list(self.script[key.stage][number]))
        self.at_once = max(self.at_once, len(self.running))

    def search(self, *args: Any) -> None:
        raise AssertionError("no search here")

    def prepare(
        self, key: Key, root: Path, options: Mapping[str, Any], workers: int, nice: int
    ) -> None:
        self.prepared.append((key.detail, bool(self.running), workers, nice))
        write_tiny(root, key.detail)
        self.queue.append(Message(key=key, done=True, value=0.0))

    def test(self, key: Key, wanted: EvaluationJob, worker: Any) -> None:
        self.tested.append((key.stage, key.detail))
        self.queue.append(Message(key=key, done=True, value=0.25))

    def poll(self, timeout_seconds: float) -> list[Message]:
        if self.queue:
            return [self.queue.pop(0)]
        return [self._step(key) for key in list(self.running)]

    def _step(self, key: Key) -> Message:
        job, accuracies = self.running[key]
        done_before = steps_on_disk(Path(job.folder))
        every = int(job.run_config["train"]["eval_every_steps"])
        index = done_before // every
        if index >= len(accuracies):  # only the decision was lost: the last report is repeated
            del self.running[key]
            return Message(key=key, report=report(accuracies, index, every), done=True)
        if isinstance(accuracies[index], str):
            del self.running[key]
            text = str(accuracies[index])
            return Message(key=key, done=True, failure=text, lost=text == "lost")
        self.steps_trained[key.stage] = self.steps_trained.get(key.stage, 0) + every
        metrics = report(accuracies, index + 1, every)
        write_checkpoint(job, accuracies, index, metrics)
        done = index + 1 == len(accuracies)
        if done:
            del self.running[key]
        return Message(key=key, report=metrics, done=done)

    def close(self) -> None:
        self.running.clear()


def report(accuracies: Iterable[float | str], count: int, every: int) -> dict[str, Any]:
    seen = [float(a) for a in list(accuracies)[:count]]
    return {
        STEPS: count * every,
        DEV_ACCURACY: seen[-1],
        BEST_DEV_ACCURACY: max(seen),
        BEST_STEP: (seen.index(max(seen)) + 1) * every,
        TRAIN_LOSS: 1.0,
        TRAIN_SECONDS: float(count),
        STEP_SECONDS: 0.5,
    }


def write_checkpoint(job: Job, accuracies: list[Any], index: int, metrics: dict[str, Any]) -> None:
    """Weights that only depend on the stage's folder and the step, like a deterministic run's."""
    token = "/".join(Path(job.folder).parts[-2:]) + str(index)
    seed = int(hashlib.sha256(token.encode()).hexdigest()[:8], 16)
    weight = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    parts: dict[str, Any] = {
        "model_state": {"weight": weight},
        "training_state": {},
        "config": parse_run_config(job.run_config),
        "metrics": metrics,
    }
    if accuracies[index] > max([0.0, *accuracies[:index]]):
        save_checkpoint(Path(job.folder) / layout.BEST_DIR, **parts)
    save_checkpoint(Path(job.folder) / layout.LAST_DIR, **parts)


def steps_on_disk(folder: Path) -> int:
    import json

    file = folder / layout.LAST_DIR / layout.METRICS_FILE
    return int(json.loads(file.read_text())[STEPS]) if file.exists() else 0


def run(
    config: CurriculumConfig,
    folder: Path,
    backend: FakeBackend,
    *,
    selected: Iterable[str] | None = None,
    cpus: int = 2,
    crash_after: int | None = None,
    observers: tuple[Any, ...] = (),
) -> tuple[bool, Curriculum]:
    """One session; with `crash_after` it dies after so many journal lines."""
    log = CurriculumLog(folder) if crash_after is None else CrashingLog(folder, crash_after)
    log.observers = observers
    with contextlib.closing(log):
        if not log.created:
            plan = [stage.brief() for stage in config.stages]
            log.record("session", pid=1, host="h", stages=plan, last_stage=config.last.name)
        controller = Controller(
            config,
            log,
            backend,
            plan=ResourcePlan(cluster=Resources(cpus, 0), cpus=1, gpus=0),
            data_root=backend.root,
            selected=[s.name for s in config.stages] if selected is None else list(selected),
        )
        return controller.run(), log
