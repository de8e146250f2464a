"""Peak memory and step time of each attention over the sequence length, and how they grow.

    python scripts/benchmarks/bench_attention.py [--attentions butterfly nystrom ...]
        [--lengths 1024 2048 ... 65536] [--real 1.0] [--tokens 65536] [--limit 60] [--threads 2]
        [--device cpu] [--out docs/benchmarks.md]

A step is forward, backward and AdamW of the LRA model (2 layers, 2 heads x 32, width 64). Each
length has the same number of tokens per step (more sequences when they are short), of which the
fraction `--real` is not masked, so linear growth shows as a constant; the printed time and memory
are those of one sequence. Each cell runs in a process of its own; on a GPU all run in one, since
to start it takes longer than to measure there, and the peak is what torch allocated. An attention
leaves the table after the first step that takes longer than `--limit` seconds or does not fit into
memory. The slope is that of log(value) over log(length), fitted to all lengths: 1 is linear, 2
quadratic.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_cases import our_step, peak_mb, write_section

from dmx.attention import ATTENTIONS, AttentionConfig, MixerContext
from dmx.errors import ConfigError
from dmx.model import Classifier, ModelConfig

LENGTHS = [1024 << k for k in range(7)]
SIZES = {
    "butterfly": {"block_size": 128},
    "nystrom": {"num_landmarks": 64},
    "linformer": {"projection_dim": 256},
    "performer": {"num_features": 256},
    "reformer": {"num_hashes": 2},
}
"""Fixed over the lengths: a size that grows with them would not be linear."""


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS.names())
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--real", type=float, default=1.0, help="fraction of tokens not masked")
    parser.add_argument("--tokens", type=int, default=65536, help="per step, masked ones included")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        torch.set_num_threads(args.threads)
        print(json.dumps(_measure(args, args.cell[0], int(args.cell[1]))))
        return
    header = "| attention | " + " | ".join(f"{length:,}" for length in args.lengths)
    lines = [
        f"Command: `python scripts/benchmarks/bench_attention.py {' '.join(sys.argv[1:])}`  ",
        f"{args.real:.0%} of the tokens real, {_where(args)}, torch {torch.__version__}. "
        "Seconds of a step and peak MB above the model before it, both per sequence; the slopes "
        "are those of log(seconds) and log(MB) over log(length).",
        "",
        f"{header} | slope, time | slope, memory |",
        "|---|" + "---|" * (len(args.lengths) + 2),
    ]
    print("\n".join(lines), flush=True)
    for name in args.attentions or ATTENTIONS.names():
        lines.append(_row(args, name))
        print(lines[-1], flush=True)
    if args.out:
        section = "bench_attention" if args.device == "cpu" else "bench_attention_gpu"
        write_section(args.out, section, "\n".join(lines))


def _where(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"


def _row(args: argparse.Namespace, name: str) -> str:
    cells: list[str] = []
    found: list[tuple[int, float, float]] = []
    stop = ""
    for length in args.lengths:
        cell = {"stop": stop} if stop else _cell(args, name, length)
        if "stop" in cell:
            stop = str(cell["stop"])
            cells.append(stop)
            continue
        found.append((length, float(cell["seconds"]), float(cell["mb"])))
        digits = 3 if args.device == "cpu" else 5
        cells.append(f"{cell['seconds']:.{digits}f} s, {cell['mb']:.1f} MB")
    slopes = []
    for column in (1, 2):
        points = [(row[0], row[column]) for row in found]
        slopes.append(f"{_slope(points):.2f}" if len(points) > 1 else "")
    return f"| {name} | {' | '.join(cells)} | {' | '.join(slopes)} |"


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line through (log n, log value) by least squares."""
    x = [math.log(n) for n, _ in points]
    y = [math.log(value) for _, value in points]
    return statistics.linear_regression(x, y).slope


def _cell(args: argparse.Namespace, name: str, length: int) -> dict[str, float | str]:
    if args.device == "cpu":
        return _in_child(args, name, length)
    try:
        return _measure(args, name, length)
    except torch.OutOfMemoryError:
        return {"stop": "out of memory"}
    except RuntimeError as error:
        return {"stop": str(error).splitlines()[0][:60]}


def _in_child(args: argparse.Namespace, name: str, length: int) -> dict[str, float | str]:
    command = [sys.executable, __file__, "--cell", name, str(length)]
    for option in ("real", "tokens", "repeats", "limit", "threads"):
        command += [f"--{option}", str(getattr(args, option))]
    timeout = (args.repeats + 2) * args.limit + 60
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"stop": f"over {args.limit:g} s"}
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "killed"
        short = "out of memory" if "alloc" in reason or reason == "killed" else reason[:60]
        return {"stop": short}
    return json.loads(result.stdout.splitlines()[-1])


def _measure(args: argparse.Namespace, name: str, length: int) -> dict[str, float | str]:
    """Median seconds and peak MB of a step, per sequence."""
    config = AttentionConfig.parse({"name": name, **SIZES.get(name, {})}, "attention")
    try:
        config.check(MixerContext(length=length, num_heads=2, head_dim=32, layer_index=1))
    except ConfigError as error:
        return {"stop": str(error)[:60]}
    torch.manual_seed(0)
    model = Classifier(
        ModelConfig(vocab_size=512, max_length=length, num_classes=2), config, paired=False
    )
    batch = max(1, args.tokens // length)
    ids = torch.randint(1, 256, (batch, length)) * (torch.rand(batch, length) < args.real)
    labels = torch.randint(2, (batch,))
    on_gpu = args.device == "cuda"
    if on_gpu:
        model, ids, labels = model.cuda(), ids.cuda(), labels.cuda()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, peak = our_step(model, ids, labels), _gpu_mb if on_gpu else peak_mb
    before, seconds = peak(), []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if seconds[-1] > args.limit:
            return {"stop": f"over {args.limit:g} s"}
    median = statistics.median(seconds[1:])
    return {"seconds": median / batch, "mb": max(peak() - before, 0.1) / batch}


def _gpu_mb() -> float:
    return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    main()
