"""Curriculum against training on its last stage from scratch, at the same cost, over seeds.

    python scripts/benchmarks/bench_curriculum.py [CURRICULUM] [--seeds 1 2 3] [--data-root PATH]
        [--storage runs] [--name bench-pathx-mini] [--learning-rates 0.002]

Both arms become branches of one curriculum, so that they run side by side, a core each, through
`python -m dmx.curriculum`; the same command continues after an interruption. The arm from scratch
gets as many real tokens (lit pixels) as all stages of the other arm together, which means more
optimizer steps on the last set than the curriculum spends there. Given several learning rates, it
runs with each of them, and the best one by dev accuracy counts, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dmx.curriculum.config import CurriculumConfig, load_curriculum
from dmx.data.prepare import default_data_root, open_data
from dmx.registry import find_yaml
from dmx.schema import read_yaml, set_dotted

_SAMPLE = 2000


def tokens_per_image(curriculum: CurriculumConfig, root: Path) -> dict[str, float]:
    """Mean number of lit pixels, by stage; prepares what is missing."""
    found = {}
    for stage in curriculum.stages:
        store = open_data(stage.task, root, options=stage.generate.options(), generate=True)
        split = store.split("train")
        ids = split.gather(np.arange(min(_SAMPLE, len(split))), store.manifest.max_length)
        found[stage.name] = float((ids != 0).sum(axis=1).mean())
    return found


def equal_steps(curriculum: CurriculumConfig, tokens: Mapping[str, float]) -> int:
    """Steps on the last stage that see as many real tokens as the whole curriculum."""
    last = curriculum.stages[-1]
    total = sum(
        s.config.train.num_steps * s.config.train.batch_size * tokens[s.name]
        for s in curriculum.stages
    )
    return round(total / (last.config.train.batch_size * tokens[last.name]))


def both_arms(raw: dict[str, Any], seeds: list[int], steps: int, rates: list[float]) -> Any:
    """The branching curriculum: per seed one chain, and one stage from scratch per rate."""
    stages: list[dict[str, Any]] = []
    for seed in seeds:
        previous = None
        for stage in raw["stages"]:
            branch = json.loads(json.dumps(stage))
            branch["name"] = f"{stage['name']}-{seed}"
            branch["init_from"] = previous or "none"
            branch["seed_model"] = seed
            branch["seed_data"] = int(stage.get("seed_data", 0)) + 100 * seed
            branch["cpus"] = 1
            previous = branch["name"]
            stages.append(branch)
        for rate in rates:
            alone = json.loads(json.dumps(raw["stages"][-1]))
            alone.update(
                name=f"scratch-{seed}-{rate:g}",
                init_from="none",
                seed_model=seed,
                seed_data=int(alone.get("seed_data", 0)) + 100 * seed,
                cpus=1,
                gate="always",
                on_fail="stop",
            )
            for key, value in (("train.num_steps", steps), ("optim.learning_rate", rate)):
                if key.split(".")[0] in alone:
                    set_dotted(alone, key, value)
                else:
                    alone[key] = value
            stages.append(alone)
    last = raw["stages"][-1]["name"]
    # The last stage of the file is the one on whose test split all are measured.
    stages.sort(key=lambda s: s["name"] == f"{last}-{seeds[-1]}")
    return {"name": "bench", "defaults": raw.get("defaults", {}), "stages": stages}


def report(lineage: Mapping[str, Any], last: str, seeds: list[int], rates: list[float]) -> str:
    """The table, per seed and in the mean."""
    by_name = {s["name"]: s for s in lineage["stages"]}
    lines = ["| seed | curriculum | from scratch | its learning rate |", "|---|---:|---:|---:|"]
    ours, theirs = [], []
    for seed in seeds:
        alone = [(by_name[f"scratch-{seed}-{rate:g}"], rate) for rate in rates]
        best, rate = max(alone, key=lambda pair: pair[0]["dev_accuracy"])
        ours.append(by_name[f"{last}-{seed}"]["test_accuracy"])
        theirs.append(best["test_accuracy"])
        lines.append(f"| {seed} | {ours[-1]:.4f} | {theirs[-1]:.4f} | {rate:g} |")
    cells = [
        f"{statistics.fmean(a):.4f} ± {statistics.stdev(a):.4f}" if len(a) > 1 else f"{a[0]:.4f}"
        for a in (ours, theirs)
    ]
    lines.append(f"| mean ± standard deviation | {cells[0]} | {cells[1]} | |")
    seconds = [
        sum(s.get("train_seconds") or 0.0 for s in lineage["stages"] if "scratch" not in s["name"]),
        sum(s.get("train_seconds") or 0.0 for s in lineage["stages"] if "scratch" in s["name"]),
    ]
    lines.append(
        f"\nTest accuracy on {by_name[f'{last}-{seeds[0]}']['task']}. Training time over all seeds "
        f"and rates: {seconds[0]:.0f} s in the curriculum, {seconds[1]:.0f} s from scratch, on one "
        "core each."
    )
    return "\n".join(lines)


def main() -> int:
    """Run both arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curriculum", nargs="?", default="pathx-mini")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--learning-rates", type=float, nargs="+")
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--name", default="bench-pathx-mini")
    args = parser.parse_args()
    path = find_yaml(args.curriculum, "curricula")
    curriculum, raw = load_curriculum(path), read_yaml(path)
    tokens = tokens_per_image(curriculum, args.data_root.absolute())
    steps = equal_steps(curriculum, tokens)
    rates = args.learning_rates or [curriculum.stages[-1].config.optim.learning_rate]
    print({name: round(value, 1) for name, value in tokens.items()}, "real tokens an image")
    print(f"from scratch: {steps} steps on {curriculum.stages[-1].task}, rates {rates}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.yaml"
        file.write_text(yaml.safe_dump(both_arms(raw, args.seeds, steps, rates), sort_keys=False))
        command = [sys.executable, "-m", "dmx.curriculum", str(file), "--name", args.name]
        command += ["--storage", args.storage, "--data-root", str(args.data_root)]
        code = subprocess.call(command)
    if code != 0:
        return code
    lineage = json.loads((Path(args.storage) / args.name / "lineage.json").read_text())
    text = report(lineage, raw["stages"][-1]["name"], args.seeds, rates)
    (Path(args.storage) / args.name / "bench.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
