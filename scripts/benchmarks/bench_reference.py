"""dmx against a checkout of Solving-LRA-PathX: time and memory of a training step, data loading.

    python scripts/benchmarks/bench_reference.py --reference PATH [--tasks pathX-nogap text ...]
        [--attentions butterfly softmax ...] [--repeats 5] [--threads 2] [--out docs/benchmarks.md]

Both codes run on the same weights (the reference's, read by dmx.training.reference), batch and
threads, each in a process of its own, as its users run it. First their logits are compared. Then
steps (forward, backward, AdamW, with dropout) are timed in turn, three of ours to each of the
reference's, while the other waits. A row has medians and their ratio. CPU seconds are those of all
threads; other work on the machine disturbs them less. Peak memory is that of the first two steps
above the process before them. Loading: a split of Path-X images as the reference's pickle and as
dmx's store, read in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cases import (
    ATTENTIONS,
    CASES,
    batch_of,
    our_model,
    our_step,
    peak_mb,
    reference_logits,
    reference_model,
    reference_step,
    write_section,
)

from dmx.data.store import Manifest, open_store
from dmx.data.store_writer import StoreWriter, write_store
from dmx.nn.device import keep_freed_memory

SIDES = ("theirs", "ours")
TARGETS = {
    "pathX-nogap": 12.0, "pathX-alpha0.75": 8.0, "pathX-alpha1.25": 6.0, "text": 3.0,
    "pathfinder32": 2.5, "image": 1.5, "listops": 1.5,
}  # fmt: skip
DEFAULT = {"image": ["butterfly", *ATTENTIONS]}
"""Attentions where none is asked for, if not butterfly alone."""

IMAGES = 2000


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, metavar="PATH")
    parser.add_argument("--tasks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--attentions", nargs="+", choices=["butterfly", *ATTENTIONS])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--skip-loading", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        what, side, *rest = args.child
        if what == "steps":
            _steps(args.reference, side, *rest)
        else:
            print(json.dumps(_load_split(side, Path(rest[0]))))
        return
    lines = [
        f"Command: `{' '.join(['python', *_shown(sys.argv)])}`  ",
        f"Machine: {_machine()}; {args.threads} threads; load average {_load()} at the start.",
        "",
        "| task | attention | batch | real tokens | logits differ by | reference s | dmx s | ratio"
        " | CPU ratio | wanted | reference peak MB | dmx peak MB | memory ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in args.tasks:
        for attention in args.attentions or DEFAULT.get(task, ["butterfly"]):
            lines.append(_compare(args, task, attention))
            print(lines[-1], flush=True)
    lines.append(f"\nLoad average at the end: {_load()}.")
    if not args.skip_loading:
        lines += ["", *_loading(args.reference)]
        print("\n".join(lines[-6:]))
    if args.out:
        write_section(args.out, "bench_reference", "\n".join(lines))


def _shown(argv: list[str]) -> list[str]:
    """The command as others would type it: the checkout is theirs."""
    shown = ["scripts/benchmarks/bench_reference.py", *argv[1:]]
    place = shown.index("--reference") + 1 if "--reference" in shown else None
    return shown if place is None else [*shown[:place], "PATH", *shown[place + 1 :]]


def _compare(args: argparse.Namespace, task: str, attention: str) -> str:
    """One row of the table."""
    ids, _ = batch_of(task)
    try:
        theirs = reference_model(args.reference, task, attention)
    except ImportError as error:
        return f"| {task} | {attention} | the reference cannot run it here: {error} |" + " |" * 10
    ours = our_model(task, attention, theirs.state_dict())
    difference = (
        "random" if attention in ("performer", "reformer") else f"{_apart(theirs, ours, ids):.1e}"
    )
    del theirs, ours
    with contextlib.ExitStack() as open_ones:
        runners = {
            side: open_ones.enter_context(_Stepper(args, side, task, attention)) for side in SIDES
        }
        for _ in range(args.repeats):
            for side in ("ours", "theirs", "ours", "ours"):
                runners[side].step()
    seconds = {side: statistics.median(r.wall) for side, r in runners.items()}
    cpu = {side: statistics.median(r.cpu) for side, r in runners.items()}
    cpu_ratio = cpu["theirs"] / cpu["ours"]
    peak = {side: r.peak_mb for side, r in runners.items()}
    wanted = f"{TARGETS[task]:g}" if attention == "butterfly" else ""
    return (
        f"| {task} | {attention} | {len(ids)} | {(ids != 0).double().mean():.1%} | {difference} "
        f"| {seconds['theirs']:.3f} | {seconds['ours']:.3f} "
        f"| **{seconds['theirs'] / seconds['ours']:.2f}** | {cpu_ratio:.1f} | {wanted} "
        f"| {peak['theirs']:.0f} | {peak['ours']:.0f} | {peak['theirs'] / peak['ours']:.1f} |"
    )


class _Stepper:
    """One code in a process of its own, which does a step when it is told to."""

    def __init__(self, args: argparse.Namespace, side: str, task: str, attention: str) -> None:
        self._process = subprocess.Popen(
            _command(args, "steps", side, task, attention),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peak_mb: float = self._answer()["mb"]
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"a measuring process ended: exit code {self._process.wait()}")

    def step(self) -> None:
        """One more step, timed over there."""
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        answer = self._answer()
        self.wall.append(answer["wall"])
        self.cpu.append(answer["cpu"])

    def __enter__(self) -> _Stepper:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # ends its input, and so the process


def _steps(checkout: Path, side: str, task: str, attention: str) -> None:
    """The other end of a _Stepper."""
    ids, labels = batch_of(task)
    model: Any = reference_model(checkout, task, attention)
    make = reference_step
    if side == "ours":
        model, make = our_model(task, attention, model.state_dict()), our_step  # type: ignore[assignment]
        keep_freed_memory()  # as dmx.training.trainer does
    step: Callable[[], None] = make(model, ids, labels)
    before = peak_mb()
    step(), step()
    print(json.dumps({"mb": max(peak_mb() - before, 1.0)}), flush=True)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        step()
        times = {"wall": time.perf_counter() - start, "cpu": time.process_time() - used}
        print(json.dumps(times), flush=True)


def _apart(theirs: torch.nn.Module, ours: torch.nn.Module, ids: torch.Tensor) -> float:
    """The largest difference of logits, without dropout; it ends the run where it is above 1e-5."""
    theirs.eval(), ours.eval()
    with torch.no_grad():
        difference = (reference_logits(theirs, ids[:2]) - ours(ids[:2])).abs().max().item()
    theirs.train(), ours.train()
    if not difference <= 1e-5:
        sys.exit(f"the logits differ by {difference}; a comparison of times would mean nothing")
    return difference


def _command(args: argparse.Namespace, *what: str) -> list[str]:
    command = [sys.executable, __file__, "--reference", str(args.reference)]
    return [*command, "--threads", str(args.threads), "--child", *what]


def _load_split(side: str, path: Path) -> dict[str, float]:
    """Seconds until the first example is in hand, and memory for it."""
    before, start = peak_mb(), time.perf_counter()
    if side == "theirs":
        with path.open("rb") as file:  # what LRADataset.__init__ does
            examples = pickle.load(file)
        torch.tensor(examples[0]["input_ids_0"], dtype=torch.long)
    else:
        torch.from_numpy(open_store(path).split("train").tokens(0).copy())
    return {"seconds": time.perf_counter() - start, "mb": peak_mb() - before}


def _loading(checkout: Path) -> list[str]:
    ids = batch_of("pathX-nogap", 50)[0].numpy().astype(np.uint8)
    rows = [ids[index % len(ids)] for index in range(IMAGES)]
    with tempfile.TemporaryDirectory() as name:
        pickled, stored = Path(name) / "train.pickle", Path(name) / "store"
        with pickled.open("wb") as file:
            pickle.dump([{"input_ids_0": row.astype(np.int32), "label": 0} for row in rows], file)
        manifest = Manifest(
            task="pathX-cl14_nogap", data_name="bench", origin="bench", num_classes=2,
            max_length=16384, vocab_size=512, dtype="uint8",
        )  # fmt: skip

        def fill(writer: StoreWriter) -> None:
            for split, count in (("train", IMAGES), ("dev", 1), ("test", 1)):
                writer.add_rows(split, np.stack(rows[:count]), np.arange(count) % 2)

        write_store(stored, manifest, fill)
        sizes = {
            "theirs": pickled.stat().st_size,
            "ours": sum(f.stat().st_size for f in stored.rglob("*") if f.is_file()),
        }
        args = argparse.Namespace(reference=checkout, threads=1)
        found = {
            side: json.loads(subprocess.check_output(_command(args, "load", side, str(path))))
            for side, path in (("theirs", pickled), ("ours", stored))
        }
    lines = [
        f"Loading {IMAGES:,} Path-X images, and in proportion 200,000 (13 GB of int32 ids):",
        "",
    ]
    lines += ["| | on disk MB | s to first example | memory MB | 200,000: on disk GB |"]
    lines += ["|---|---|---|---|---|"]
    for side, label in (("theirs", "reference (pickle)"), ("ours", "dmx (store)")):
        size, load = sizes[side] / 1e6, found[side]
        lines.append(
            f"| {label} | {size:.0f} | {load['seconds']:.3f} | {load['mb']:.0f} "
            f"| {size * 200_000 / IMAGES / 1000:.1f} |"
        )
    return lines


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def _machine() -> str:
    cpu, info = platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [x.split(": ", 1)[1] for x in info.read_text().splitlines() if "model name" in x]
        cpu = names[0] if names else cpu
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {os.cpu_count()} cores; {versions}"


if __name__ == "__main__":
    main()
