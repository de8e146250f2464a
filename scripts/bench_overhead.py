"""Orchestration overhead of a study: seconds per trial beyond the Trainer's own time.

Runs the same study of tiny trials with and without actor reuse, in one Ray session, and prints, for
each, wall seconds per trial, the trials' own seconds, and the difference.

    python scripts/bench_overhead.py --num-trials 20
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from dmx.cluster import check_request, connect
from dmx.data.locate import locate
from dmx.log import console
from dmx.records import PROCESS_SECONDS
from dmx.space import load_space
from dmx.study import StudyConfig, run_study

SETTINGS = {
    "train.num_steps": 4,
    "train.eval_every_steps": 2,
    "train.batch_size": 1,
    "train.eval_batch_size": 64,
    "optim.warmup_steps": 2,
    "model.num_layers": 1,
    "model.embedding_dim": 8,
    "model.hidden_dim": 8,
    "model.num_heads": 1,
    "model.head_dim": 8,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-trials", type=int, default=20)
    args = parser.parse_args()
    store = locate("text", None, allow_sample=True)
    space = load_space("butterfly", "text", "text").without(SETTINGS)
    out = console()
    root = Path(tempfile.mkdtemp(prefix="dmx-overhead-"))
    with connect(None) as resources:
        slots = check_request(resources, cpus=1, gpus=0)
        for reuse in (True, False):
            config = StudyConfig(
                name=f"reuse-{reuse}",
                task="text",
                space=space,
                overrides=SETTINGS,
                num_trials=args.num_trials,
                max_steps=4,
                grace_steps=4,
                scheduler="none",
                reuse_actors=reuse,
            )
            folder = root / config.name
            started = time.perf_counter()
            result = run_study(config, store, folder, slots=slots)
            wall = time.perf_counter() - started
            own = sum(float(t.metrics[PROCESS_SECONDS]) for t in result.trials)
            per = (wall * slots - own) / args.num_trials
            out.print(
                f"actor reuse {reuse}: {args.num_trials} trials, {slots} at once, "
                f"wall {wall:.1f} s; own {own / args.num_trials:.3f} s a trial, "
                f"overhead {per:.3f} core-s a trial, "
                f"{wall / args.num_trials:.3f} wall-s a trial"
            )
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
