"""Time and memory of a training step on a GPU: dense and packed, fp32, bf16 and compiled.

    python scripts/benchmarks/bench_gpu.py [--tasks pathX-nogap ...] [--variants packed-bf16 ...]
        [--batches .gpu] [--reference PATH] [--seconds 3] [--device cuda] [--markdown]

A step is forward, backward and AdamW with the batch of the paper's runs (Path-X: 64 sequences as
two micro-batches of 32) and the dropout of its recipes. Ids are real images of Path-X and synthetic
tokens of real lengths (see bench_cases.batch_of); `--batches` takes them from files that
gpu_pack.py wrote, since to draw the images takes a compiler's minute. Time is the
median of CUDA events around a step, after three that warm up. The peak is what torch allocated.
Each line is printed as soon as it is measured, so that a run cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_cases import CASES, batch_of, reference_model, reference_step

from dmx.attention import AttentionConfig
from dmx.model import Classifier, ModelConfig
from dmx.nn.optim import OptimConfig, build_optimizer

WARM_UP = 3
MOST_STEPS = 50


@dataclass(frozen=True)
class Sizes:
    """Sequences of an optimizer step, and of one forward pass."""

    batch: int
    micro: int


BATCHES = {
    "pathX-nogap": Sizes(64, 32),
    "pathX-alpha0.75": Sizes(64, 32),
    "pathX-alpha1.25": Sizes(64, 32),
    "text": Sizes(32, 32),
    "image": Sizes(256, 256),
    "listops": Sizes(32, 32),
}
"""run_tasks.py and the README of Solving-LRA-PathX: batch and GPU batch."""
VARIANTS = ("dense-fp32", "packed-fp32", "dense-bf16", "packed-bf16")
COMPILED = ("dense-bf16-compiled", "packed-bf16-compiled")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=[*VARIANTS, *COMPILED]
    )
    parser.add_argument("--batches", type=Path, default=Path(".gpu"))
    parser.add_argument("--reference", type=Path, help="a checkout of Solving-LRA-PathX")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell")
    parser.add_argument("--batch", type=int, help="another batch, for a try")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    print("| task | batch | real tokens | variant | ms a step | sequences/s | peak MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for task in args.tasks:
        ids, labels = _batch(args, task)
        names = [*args.variants, *(["reference-fp32"] if args.reference else [])]
        for variant in names:
            try:
                cells = _measure(args, task, variant, ids, labels)
            except Exception as error:  # the next cell may well work
                text = str(error).splitlines()
                cells = f"{type(error).__name__}: {text[0] if text else ''}"[:90] + " | | "
            real = (ids != 0).double().mean()
            print(f"| {task} | {len(ids)} | {real:.1%} | {variant} | {cells} |", flush=True)


def _batch(args: argparse.Namespace, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    path, count = args.batches / f"{task}.npz", args.batch or BATCHES[task].batch
    if not path.is_file():
        ids, labels = batch_of(task, count)
        return ids.to(torch.uint8), labels
    with np.load(path, allow_pickle=False) as found:
        ids, labels = torch.from_numpy(found["ids"]), torch.from_numpy(found["labels"])
    return ids[:count], labels[:count]


def our_gpu_step(
    task: str, variant: str, ids: torch.Tensor, labels: torch.Tensor, micro: int
) -> Callable[[], None]:
    """A step as dmx.training.trainer does it; ids and labels lie on the device."""
    case, device = CASES[task], ids.device
    recipe: dict[str, Any] = case.recipe
    torch.manual_seed(0)
    model: Any = Classifier(
        ModelConfig(
            num_layers=recipe["num_layers"],
            num_heads=recipe["num_head"],
            head_dim=recipe["head_dim"],
            embedding_dropout=recipe["embedding_dropout"],
            mlp_dropout=recipe["mlp_dropout"],
            execution="packed" if "packed" in variant else "dense",
            vocab_size=case.vocab_size,
            max_length=case.length,
            num_classes=case.num_classes,
        ),
        AttentionConfig.parse(
            {"name": "butterfly", "block_size": case.block, "dropout": recipe["attention_dropout"]},
            "attention",
        ),
        paired=False,
    ).to(device)
    config = OptimConfig(learning_rate=1e-4, weight_decay=1e-3, warmup_steps=100)
    optimizer, schedule = build_optimizer(model.parameters(), config, 1000)
    run = torch.compile(model) if "compiled" in variant else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part, wanted in zip(ids.split(micro), labels.split(micro), strict=True):
            with (
                torch.autocast(device.type, dtype=torch.bfloat16)
                if "bf16" in variant
                else contextlib.nullcontext()
            ):
                logits = run(part)
            (F.cross_entropy(logits.float(), wanted) * (len(wanted) / len(labels))).backward()
        optimizer.step()
        schedule.step()

    return step


def _measure(
    args: argparse.Namespace, task: str, variant: str, ids: torch.Tensor, labels: torch.Tensor
) -> str:
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids, labels = ids.to(device), labels.to(device)
    if variant == "reference-fp32":
        theirs = reference_model(args.reference, task, "butterfly").to(device).train()
        micro = BATCHES[task].micro
        step = reference_step(theirs, ids[:micro].long(), labels[:micro])
        whole = len(ids) / micro  # it has no micro-batches: a step of one, times their number
    else:
        step, whole = our_gpu_step(task, variant, ids, labels, BATCHES[task].micro), 1.0
    for _ in range(WARM_UP):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    began, times = time.perf_counter(), []
    while len(times) < MOST_STEPS and (
        len(times) < 3 or time.perf_counter() - began < args.seconds
    ):
        times.append(_timed(step, on_gpu) * whole)
    milliseconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan")
    return f"{milliseconds:.2f} | {len(ids) / milliseconds * 1000:,.0f} | {peak:,.0f}"


def _timed(step: Callable[[], None], on_gpu: bool) -> float:
    """Milliseconds of a step."""
    if not on_gpu:
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1000
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


if __name__ == "__main__":
    main()
