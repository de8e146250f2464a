"""What a curriculum does next, and with how much: pure functions of its file and its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmx.cluster.capacity import Resources, check_request
from dmx.config import RunConfig
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.errors import ConfigError
from dmx.nn.device import pick_device
from dmx.runs.curriculum import Attempt, Curriculum, Stage
from dmx.runs.layout import DEV_ACCURACY
from dmx.training.job import Workers, check_batch, check_device, share_out

NextStep = Literal["promote", "retry", "longer", "stop"]
_SEED_STEP = 1009
"""How far a retry's seeds lie from the stage's own."""

# -- what could start ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A stage to start, or to continue after a crash.

    Attributes:
        number: the attempt's number, its folder. retry: see Attempt.
        config: what is trained. source: where the weights come from: {} for nowhere, else `path`
            with `stage` and `attempt` where it is a stage of this run.
        resumed: the attempt was launched before.
    """

    stage: StageConfig
    number: int
    retry: int
    config: RunConfig
    source: Mapping[str, Any]
    resumed: bool

    @property
    def reinit(self) -> tuple[str, ...]:
        """What may start afresh; weights of the stage itself fit as they are."""
        return () if self.source.get("stage") == self.stage.name else self.stage.reinit


def next_launches(
    curriculum: CurriculumConfig,
    record: Curriculum,
    selected: Collection[str],
    busy: Collection[str] = (),
) -> list[Launch]:
    """Every selected stage that could run now and is not `busy`, in the file's order."""
    found = []
    for stage in curriculum.stages:
        state = record.stage(stage.name)
        waits = stage.parent is not None and record.stage(stage.parent).promoted is None
        ended = state.status in ("passed", "failed")
        if stage.name in selected and stage.name not in busy and not ended and not waits:
            found.append(_launch(stage, state, record))
    return found


def _launch(stage: StageConfig, state: Stage, record: Curriculum) -> Launch:
    current = state.current
    resumed = current is not None and not current.decision
    retry = len(state.attempts) - resumed
    return Launch(
        stage=stage,
        number=state.next_number - resumed,
        retry=retry,
        config=attempt_config(stage, retry),
        source=_source(stage, state, record, retry),
        resumed=resumed,
    )


def _source(stage: StageConfig, state: Stage, record: Curriculum, retry: int) -> dict[str, Any]:
    on_fail = stage.on_fail
    source, checkpoint = stage.parent, None
    if retry and on_fail.action == "longer" and not on_fail.afresh and stage.search is None:
        checkpoint = state.attempts[retry - 1].decision["checkpoint"]
    if checkpoint is not None:
        source = stage.name
    elif source is not None:
        checkpoint = record.stage(source).promoted
    if checkpoint is None:
        return {} if stage.init_path is None else {"path": stage.init_path}
    return {"stage": source, **{key: checkpoint[key] for key in ("attempt", "path", "sha256")}}


def attempt_config(stage: StageConfig, retry: int) -> RunConfig:
    """The stage's config, with the seeds or the steps of a later try."""
    config = stage.config
    if retry == 0:
        return config
    if stage.on_fail.action == "longer":
        steps = round(config.train.num_steps * stage.on_fail.factor**retry)
        steps = max(steps, config.optim.warmup_steps + 1)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=steps))
    shift = _SEED_STEP * retry
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=config.train.seed + shift),
        data=dataclasses.replace(config.data, seed=config.data.seed + shift),
    )


# -- how an attempt ends ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ends.

    Attributes:
        passed: what the gate said. reason: which rule fired. next: what follows.
        attempt: the attempt that is promoted, if one is.
    """

    passed: bool
    reason: str
    next: NextStep
    attempt: int | None = None

    @property
    def outcome(self) -> str:
        """What follows, in words."""
        if self.passed:
            return "promoted"
        return {
            "promote": "promoted all the same (on_fail: continue)",
            "retry": "not passed; trying again with new seeds (on_fail: retry)",
            "longer": "not passed; training longer (on_fail: longer)",
            "stop": "not passed; this branch ends here (on_fail: stop)",
        }[self.next]


def judge(
    stage: StageConfig,
    attempts: list[Attempt],
    checkpoints: Mapping[int, Mapping[str, Any]],
    failure: str | None,
) -> Verdict:
    """Decide about the latest of a stage's attempts.

    Args:
        checkpoints: the best one of each attempt, where one exists; see Stage.promoted.
        failure: why the attempt broke, if it did; then it never passes.
    """
    current, on_fail = attempts[-1], stage.on_fail
    passed, reason = False, f"failed: {failure or 'it left no checkpoint'}"
    if failure is None and current.number in checkpoints:
        decision = stage.gate.decide(current)
        passed, reason = decision.passed, decision.reason
    if passed:
        return Verdict(passed=True, reason=reason, next="promote", attempt=current.number)
    again = on_fail.action == "retry" or (on_fail.action == "longer" and failure is None)
    if again and len(attempts) <= on_fail.times:
        return Verdict(passed=False, reason=reason, next=on_fail.action)  # type: ignore[arg-type]
    if "continue" in (on_fail.action, on_fail.then) and checkpoints:
        best = max(checkpoints, key=lambda n: (_accuracy(checkpoints[n]), -n))
        return Verdict(passed=False, reason=reason, next="promote", attempt=best)
    return Verdict(passed=False, reason=reason, next="stop")


def _accuracy(checkpoint: Mapping[str, Any]) -> float:
    accuracy = checkpoint[DEV_ACCURACY]
    return -1.0 if accuracy is None else float(accuracy)


# -- what else is left --------------------------------------------------------------------------


def wanted_tests(
    curriculum: CurriculumConfig, record: Curriculum
) -> list[tuple[StageConfig, StageConfig]]:
    """(stage, stage whose test split) that are not measured yet: its own, and the last one's."""
    return [
        (stage, on)
        for stage in curriculum.stages
        if (state := record.stage(stage.name)).promoted is not None
        for on in {s.name: s for s in (stage, curriculum.last)}.values()
        if on.name not in state.tests
    ]


def to_rejudge(
    curriculum: CurriculumConfig, record: Curriculum, selected: Collection[str]
) -> list[StageConfig]:
    """Stages that were refused by a gate, or an on_fail, that has been changed since."""
    return [
        stage
        for stage in curriculum.stages
        if stage.name in selected
        and (state := record.stage(stage.name)).status == "failed"
        and state.attempts[-1].judging != stage.judging()
    ]


def all_passed(record: Curriculum, selected: Collection[str]) -> bool:
    """Whether every selected stage was promoted."""
    return all(record.stage(name).status == "passed" for name in selected)


def has_work(curriculum: CurriculumConfig, record: Curriculum, selected: Collection[str]) -> bool:
    """Whether a session would find anything to do."""
    return bool(
        next_launches(curriculum, record, selected)
        or wanted_tests(curriculum, record)
        or to_rejudge(curriculum, record, selected)
    )


# -- with how much ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ResourcePlan:
    """What the cluster has, and what one run gets of it where its stage does not say."""

    cluster: Resources
    cpus: float
    gpus: float
    workers: int | None = None

    def request_for(self, stage: StageConfig) -> tuple[float, float]:
        """(CPUs, GPUs) of one of the stage's runs."""
        cpus = self.cpus if stage.cpus is None else stage.cpus
        return cpus, self.gpus if stage.gpus is None else stage.gpus

    def workers_for(self, stage: StageConfig) -> Workers:
        """The processes that share the work of one of the stage's runs, and what each has."""
        cpus, gpus = self.request_for(stage)
        workers = self.workers if stage.workers is None and not stage.gpus else stage.workers
        return share_out(cpus=cpus, gpus=gpus, workers=workers)


def plan_resources(
    curriculum: CurriculumConfig,
    resources: Resources,
    *,
    cpus: float | None,
    gpus: float | None,
    workers: int | None,
) -> ResourcePlan:
    """Choose what a caller left open.

    With GPUs a run has one of them and its share of the cores; without, the cores are shared by as
    many stages as could ever run at once. No run exceeds the cluster's largest node.
    """
    if gpus is None:
        gpus = 1.0 if resources.num_gpus else 0.0
    if cpus is None:
        runs = int(resources.num_gpus / gpus) if gpus else len(curriculum.leaves)
        largest = max((int(node[0]) for node in resources.nodes), default=resources.num_cpus)
        cpus = float(max(min(resources.num_cpus, largest) // max(runs, 1), 1))
    return ResourcePlan(cluster=resources, cpus=cpus, gpus=gpus, workers=workers)


def check_plan(curriculum: CurriculumConfig, plan: ResourcePlan, *, local: bool) -> None:
    """See that each stage's runs have room, and on this machine the device that they insist on."""
    for stage in curriculum.stages:
        cpus, gpus = plan.request_for(stage)
        try:
            if local:
                pick_device(stage.config.train.device)
            shared = plan.workers_for(stage)
            check_request(plan.cluster, cpus=cpus, gpus=gpus, workers=shared.count)
            check_batch(stage.config.train.batch_size, shared.count)
            check_device(stage.config.train.device, shared)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name}: {error}") from None
