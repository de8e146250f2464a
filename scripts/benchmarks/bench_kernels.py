"""What handwritten CPU kernels bring: steps with and without them, or of two trees, in turn.

    python scripts/benchmarks/bench_kernels.py VARIANT VARIANT [...] [--cases pathX-nogap text ...]
        [--attention butterfly] [--rounds 15] [--threads 2] [--results kernels.jsonl]
        [--out docs/benchmarks.md]

A VARIANT is `LABEL=TREE` or `LABEL=TREE:SWITCH,SWITCH`: a source tree of dmx (`.` is this one), and
what is switched off in it: a module, whose function `is_fast` then says no, so that plain torch
computes, or a function (`nn.cpu.dropout_attention`), for which torch's own stands in. The first one
is what all others are held against.

Each variant has a process of its own; in every round each makes one step of the case (batch, model
and dropouts of the recipe, forward, backward, AdamW), in an order drawn anew, while the others
wait. What is compared are the rounds: the median of (seconds of the other) / (seconds of the
first), so that other work on the machine meets both. Rounds are written to `--results`, and those
that are there count: a command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES = [
    "pathX-nogap",
    "pathX-alpha0.75",
    "pathX-alpha1.25",
    "text",
    "pathfinder32",
    "image",
    "listops",
]


def main() -> None:
    """Parse, measure, write."""
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", metavar="LABEL=TREE[:SWITCH,...]")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--attention", default="butterfly")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("kernels.jsonl"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    variants = dict(word.split("=", 1) for word in args.variants)
    first, *others = variants
    lines = [
        f"Command: `python scripts/benchmarks/bench_kernels.py {' '.join(sys.argv[1:])}`  ",
        f"Medians of {args.rounds} rounds, {args.threads} threads, {os.cpu_count()} cores; seconds "
        f"of a step of `{first}`, and the others' as a multiple of it (of CPU seconds).",
        "",
        f"| case | {first}, s | " + " | ".join(others) + " |",
        "|---|" + "---|" * len(variants),
    ]
    print("\n".join(lines), flush=True)
    for case in args.cases:
        rounds = _rounds(args, case, variants)
        seconds = statistics.median(r[first][0] for r in rounds)
        cells = [
            f"{_ratio(rounds, first, o, 0):.2f} ({_ratio(rounds, first, o, 1):.2f})" for o in others
        ]
        lines.append(f"| {case} | {seconds:.3f} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.out:
        from bench_cases import write_section

        write_section(args.out, "bench_kernels", "\n".join(lines))


def _ratio(rounds: list[dict[str, list[float]]], first: str, other: str, clock: int) -> float:
    return statistics.median(r[other][clock] / r[first][clock] for r in rounds)


def _rounds(args: argparse.Namespace, case: str, variants: dict[str, str]) -> list[dict[str, Any]]:
    """Per round: label -> seconds and CPU seconds of a step."""
    key = {"case": case, "attention": args.attention, "threads": args.threads, "of": variants}
    rounds = []
    if args.results.is_file():
        found = map(json.loads, args.results.read_text().splitlines())
        rounds = [line["seconds"] for line in found if line["key"] == key][: args.rounds]
    if len(rounds) == args.rounds:
        return rounds
    with contextlib.ExitStack() as stack:
        children = {
            label: stack.enter_context(_Child(place, case, args.attention, args.threads))
            for label, place in variants.items()
        }
        draw = random.Random(len(rounds))
        while len(rounds) < args.rounds:
            order = draw.sample(list(children), len(children))
            seconds = {label: children[label].step() for label in order}
            rounds.append(seconds)
            with args.results.open("a") as file:
                print(json.dumps({"key": key, "seconds": seconds}), file=file)
    return rounds


class _Child:
    """A process with a model of one variant, which makes a step when it is told."""

    def __init__(self, place: str, case: str, attention: str, threads: int) -> None:
        command = [sys.executable, __file__, "--child", place, case, attention, str(threads)]
        environment = {**os.environ, "PYTHONPATH": ""}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def step(self) -> list[float]:
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        sys.exit(f"a measuring process ended: exit code {self._process.wait()}")

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def _child(place: str, case: str, attention: str, threads: str) -> None:
    """The other end of a _Child."""
    tree, _, switches = place.partition(":")
    (cases,) = Path(tree).resolve().glob("scripts/**/bench_cases.py")
    sys.path[:0] = [str(Path(tree).resolve()), str(cases.parent)]
    import bench_cases
    import torch

    import dmx

    assert Path(dmx.__file__).parents[1] == Path(tree).resolve()
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model = _model(case, attention)
    for name in filter(None, switches.split(",")):
        _switch_off(name)
    _keep_freed_memory()
    step = bench_cases.our_step(model, *bench_cases.batch_of(case))
    step(), step()
    print("[]", flush=True)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        step()
        print([time.perf_counter() - start, time.process_time() - used], flush=True)


def _model(name: str, attention: str) -> Any:
    import bench_cases

    from dmx.attention import AttentionConfig
    from dmx.model import Classifier, ModelConfig
    from dmx.training.reference import attention_settings

    case, recipe = bench_cases.CASES[name], bench_cases.CASES[name].recipe
    config = ModelConfig(
        num_layers=recipe["num_layers"],
        num_heads=recipe["num_head"],
        head_dim=recipe["head_dim"],
        embedding_dropout=recipe["embedding_dropout"],
        mlp_dropout=recipe["mlp_dropout"],
        vocab_size=case.vocab_size,
        max_length=case.length,
        num_classes=case.num_classes,
    )
    settings = attention_settings(bench_cases.reference_config(name, attention))
    return Classifier(config, AttentionConfig.parse(settings, "attention"), paired=False).train()


def _keep_freed_memory() -> None:
    """As dmx.training.trainer does, wherever the tree has it."""
    import dmx.training.trainer

    dmx.training.trainer.keep_freed_memory()  # type: ignore[attr-defined]


def _switch_off(name: str) -> None:
    """`nn.ends`: its `is_fast` says no. `nn.cpu.dropout_attention`: torch's attention instead.

    `nn.parallel.single_thread`: an empty context.
    """
    if f"dmx.{name}" in sys.modules:
        sys.modules[f"dmx.{name}"].is_fast = lambda x: False  # type: ignore[attr-defined]
        return
    home, _, function = name.rpartition(".")
    original = getattr(sys.modules[f"dmx.{home}"], function)
    for module in list(sys.modules.values()):
        if module.__name__.startswith("dmx") and getattr(module, function, None) is original:
            setattr(module, function, _INSTEAD[function])


def _plain_attention(q: Any, k: Any, v: Any, keep: Any, dropout: float) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout)


_INSTEAD = {
    "single_thread": lambda x: contextlib.nullcontext(),
    "dropout_attention": _plain_attention,
}


if __name__ == "__main__":
    main()
