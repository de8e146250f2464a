"""`--dry-run`: the whole chain checked and measured, and nothing started."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from dmx import terminal
from dmx.cluster.capacity import local_resources
from dmx.costs.estimate import Cost, stage_cost
from dmx.curriculum import checks
from dmx.curriculum.config import CurriculumConfig, StageConfig
from dmx.curriculum.resources import plan_resources
from dmx.curriculum.session import Options
from dmx.data.store import Store
from dmx.format import duration
from dmx.runs import layout
from dmx.runs.stages import fold
from dmx.storage.journal import read_journal
from dmx.tasks import NUM_IMAGES
from dmx.terminal import Column, FittingTable
from dmx.training.transfer import TransferReport

StageCosts = Mapping[str, tuple[Cost, str]]
"""By stage: what it costs, and what that was measured on."""
_DEV_SHARE = 0.1


def dry_run(curriculum: CurriculumConfig, options: Options) -> None:
    """Check all that a session would, and print what every stage takes over, needs and costs.

    Raises:
        DmxError: what a session would be refused for.
    """
    local = options.address is None
    checks.check_device(curriculum, local=local)
    data = {s.name: checks.find_data(s, options.data_root) for s in curriculum.stages}
    transfers = checks.check_transfers(curriculum, data)
    history = fold(read_journal(options.folder / layout.JOURNAL_FILE)[0])
    if history.stages and options.from_stage is None:
        checks.check_unchanged(curriculum, history)
    plan = plan_resources(curriculum, local_resources(), **options.request, check=local)
    threads = {s.name: max(int(plan.request_for(s)[0]), 1) for s in curriculum.stages}
    count = len(curriculum.stages)
    terminal.verbatim(f"curriculum {curriculum.name}: {count} stages; data in {options.data_root}")
    out = terminal.console()
    out.print(_chain(curriculum, data, transfers))
    costs = {}
    for stage in curriculum.stages:
        store = data[stage.name]
        config, dev = checks.resolve(stage.config, store), _dev_examples(stage, store)
        costs[stage.name] = stage_cost(config, store, dev, threads=threads[stage.name])
    out.print(_costs(curriculum, costs, max(threads.values())))
    for line in _remarks(curriculum, data, costs):
        out.print(line, highlight=False)
    out.print("All checks passed. Nothing was started (--dry-run).")


def _dev_examples(stage: StageConfig, store: Store | None) -> int:
    if store is not None:
        return int(store.manifest.splits["dev"])
    return round(_DEV_SHARE * (stage.generate.num_images or NUM_IMAGES))


_SPARE = {"seeds": 1, "warmup": 2, "dev pass": 1, "GFLOPs a step": 2}
"""Columns that a narrow terminal does without, the highest first."""


def _chain(
    curriculum: CurriculumConfig,
    data: Mapping[str, Store | None],
    transfers: Mapping[str, TransferReport],
) -> FittingTable:
    names = ("stage", "task", "attention", "batch", "steps", "warmup", "seeds")
    table = FittingTable(
        "what is trained, and from what",
        (
            *(Column(n, fold=n in ("stage", "task"), spare=_SPARE.get(n, 0)) for n in names),
            *(Column(n, fold=True) for n in ("starts from", "gate", "data")),
        ),
    )
    for stage in curriculum.stages:
        config = stage.config
        size = "" if config.attention.size is None else f"-{config.attention.size}"
        micro = config.train.micro_batch_size or config.train.batch_size
        store = data[stage.name]
        images = stage.generate.num_images or NUM_IMAGES
        table.add_row(
            stage.name,
            stage.task if stage.task != stage.name else "same",
            f"{config.attention.name}{size}",
            str(config.train.batch_size)
            + (f" by {micro}" if micro != config.train.batch_size else ""),
            f"{config.train.num_steps:,}",
            str(config.optim.warmup_steps),
            f"{config.train.seed}/{config.data.seed}",
            _source(stage, transfers),
            stage.gate.name + ("" if stage.search is None else f", search {stage.search.space}"),
            f"generate {images:,}" if store is None else "present",
        )
    return table


def _source(stage: StageConfig, transfers: Mapping[str, TransferReport]) -> str:
    report = transfers.get(stage.name)
    if report is None:
        return "nothing"
    parts = [f"{len(report.moved)} equal"]
    parts += [report.positions] if report.positions else []
    parts += [f"{len(report.fresh)} afresh"] if report.fresh else []
    parts += [f"{len(report.dropped)} left out"] if report.dropped else []
    return f"{stage.parent or stage.init_path} ({', '.join(parts)})"


def _costs(curriculum: CurriculumConfig, costs: StageCosts, most_threads: int) -> FittingTable:
    device = next(iter(costs.values()))[0].probes[0].device
    if device == "cuda":
        device = torch.cuda.get_device_name()
    threads = f"{most_threads} thread{'s' * (most_threads > 1)}"
    where = f"{device}, {threads}" if device == "cpu" else device
    names = ("parameters", "real tokens", "GFLOPs a step", "memory", "step", "dev pass")
    table = FittingTable(
        f"what it costs, measured on this device ({where})",
        (
            Column("stage", fold=True),
            *(Column(n, right=True, spare=_SPARE.get(n, 0)) for n in (*names, "stage takes")),
            Column("measured on", fold=True, spare=3),
        ),
    )
    total = 0.0
    for stage in curriculum.stages:
        cost, measured_on = costs[stage.name]
        trials = 1 if stage.search is None else stage.search.num_trials
        total += cost.wall_seconds * trials
        table.add_row(
            stage.name,
            f"{cost.models[0].parameters:,}",
            f"{cost.models[0].tokens / stage.config.train.batch_size:,.0f} of "
            f"{stage.config.task_info.max_length:,}",
            f"{cost.models[0].flops / 1e9:,.1f}",
            f"{cost.memory_bytes / 2**20:,.0f} MiB",
            f"{cost.step_seconds:.3g} s",
            duration(cost.eval_seconds),
            duration(cost.wall_seconds * trials),
            measured_on,
        )
    table.add_section()
    table.add_row("all", *[""] * 6, duration(total), "")
    return table


def _remarks(
    curriculum: CurriculumConfig, data: Mapping[str, Store | None], costs: StageCosts
) -> list[str]:
    lines = []
    if next(iter(costs.values()))[0].probes[0].device == "cpu":
        lines.append(
            "memory: weights, AdamW and the tensors that one micro batch saves for the backward "
            "pass, in float32; the process itself needs about 400 MiB more."
        )
    missing = {s.task: s for s in curriculum.stages if data[s.name] is None}
    for task, stage in missing.items():
        images = stage.generate.num_images or NUM_IMAGES
        rate = _images_per_second(task)
        lines.append(
            f"data: {task} will be generated beside the training before it: {images:,} images, "
            f"{duration(images / rate)} of one core ({rate:,.0f} images/s)."
        )
    return lines


def _images_per_second(task: str, images: int = 12) -> float:
    from dmx.data.pathfinder import Generator

    generator = Generator(task, 123)
    generator.image(0)  # compiles what has to be compiled
    started = time.perf_counter()
    for index in range(1, images + 1):
        generator.image(index)
    return images / (time.perf_counter() - started)
