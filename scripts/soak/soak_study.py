"""What soak.py runs and how it judges: a tiny study, its journal, and what must hold in the end.

Imported by soak.py; it is no command. Nothing here trusts dmx's own reading of a study: journals
are parsed and ASHA's decisions derived again.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend

from dmx.config import parse_run_config
from dmx.data.store import Manifest
from dmx.data.store_writer import StoreWriter, write_store
from dmx.schema import to_dict
from dmx.search.space import load_space
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import EvaluationJob, evaluate_checkpoint
from dmx.training.job import Job
from dmx.training.runner import Runner

TASK = "pathfinder16-cl3-d1"
LENGTH = 256
EVERY, MAX_STEPS, GRACE, FACTOR = 4, 36, 4, 3.0
SPACE = """
attention: butterfly
space:
  attention.block_size: {choice: [16, 32]}
  attention.inner: {choice: [softmax, linear]}
  optim.learning_rate: {loguniform: [1.0e-4, 3.0e-2]}
  model.dropout: {uniform: [0.0, 0.3]}
"""
FIXED = {
    "model.num_layers": 1,
    "model.embedding_dim": 16,
    "model.hidden_dim": 16,
    "model.head_dim": 8,
    "train.batch_size": 8,
    "train.eval_every_steps": EVERY,
    "optim.warmup_steps": 3,
}
CLOCKED = ("_seconds", "_per_second", "_memory_mb")


def _clocked(key: str) -> bool:
    """Whether a clock or the machine decides the value."""
    return any(word in key for word in CLOCKED)


def write_data(root: Path) -> None:
    """A learnable set: class 1 has 9s where class 0 has 5s, a quarter of the tokens."""
    if (root / TASK).exists():
        return
    manifest = Manifest(
        task=TASK, data_name="soak", origin="scripts/soak/soak_study.py", note="made up",
        num_classes=2, max_length=LENGTH, vocab_size=512, dtype="uint8",
    )  # fmt: skip
    draw = np.random.default_rng(0)

    def fill(writer: StoreWriter) -> None:
        for split, count in {"train": 200, "dev": 61, "test": 41}.items():
            for _ in range(count):
                label = int(draw.integers(2))
                ids = draw.integers(1, 200, size=int(draw.integers(10, LENGTH + 1)))
                ids[draw.random(len(ids)) < 0.25] = 9 if label else 5
                writer.add(split, ids.astype(np.uint8), label)

    write_store(root / TASK, manifest, fill)


def command(folder: Path, name: str, *, trials: int, slots: int, address: str | None) -> list[str]:
    """`python -m dmx.tune` for the study `name` below `folder`."""
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    words = [sys.executable, "-m", "dmx.tune", "--attention", "butterfly", "--task", TASK]
    words += ["--data-root", str(folder / "data"), "--storage", str(folder / "runs")]
    words += ["--name", name, "--space", str(folder / "space.yaml"), "--seed", "4"]
    words += ["--num-trials", str(trials), "--max-steps", str(MAX_STEPS), "--cpus-per-trial", "1"]
    words += ["--max-concurrent-trials", str(slots), "--output", "plain"]
    words += [] if address is None else ["--address", address]
    for key, value in FIXED.items():
        words += ["--set", f"{key}={value}"]
    return words


def journal(study: Path) -> list[dict[str, Any]]:
    """What the journal tells of trials; what each session says of itself is left out."""
    path = study / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    events = (json.loads(line) for line in lines)
    return [event for event in events if event["event"] not in ("settings", "session")]


def facts(study: Path) -> list[dict[str, Any]]:
    """The journal's events in order, without what a clock decides."""
    found = []
    for event in journal(study):
        metrics = event.get("metrics", {})
        kept = {k: v for k, v in metrics.items() if not _clocked(k)}
        found.append({k: v for k, v in event.items() if k not in ("time", "crc", "metrics")})
        found[-1].update(metrics=kept)
    return found


def rows(study: Path) -> list[dict[str, str]]:
    """trials.csv without what a clock decides."""
    with (study / "trials.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not _clocked(k)} for row in table]


def lost_and_twice(study: Path, trials: int) -> tuple[int, int]:
    """Trials without an end; and reports or ends that were recorded more than once."""
    events = journal(study)
    ends = Counter(e["trial"] for e in events if e["event"] == "outcome")
    reports = Counter((e["trial"], e["step"]) for e in events if e["event"] == "report")
    lost = len(set(range(trials)) - ends.keys())
    return lost, sum(n - 1 for n in (*ends.values(), *reports.values()))


def differences(study: Path, whole: Path) -> Iterator[str]:
    """In what a study with one trial at a time differs from the one that nobody disturbed."""
    if rows(study) != rows(whole):
        yield "trials.csv differs"
    if facts(study) != facts(whole):
        yield "the journal differs"
    one, two = (json.loads((s / "study.json").read_text())["best"] for s in (study, whole))
    if one != two:
        yield f"best is {one}, not {two}"
    for name in ("model.safetensors", "config.yaml"):
        if (study / "best" / name).read_bytes() != (whole / "best" / name).read_bytes():
            yield f"best/{name} differs"


def violations(study: Path, trials: int, folder: Path) -> Iterator[str]:
    """What must hold of every study, whatever the order in which its reports came."""
    events = journal(study)
    numbers = {e["trial"] for e in events}
    if numbers != set(range(trials)):
        yield f"trials are {sorted(numbers)}"
    ends = {e["trial"]: e for e in events if e["event"] == "outcome"}
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(study / "optuna.journal")))
    told = optuna.load_study(study_name=study.name, storage=storage).get_trials()
    names = {"COMPLETE": "COMPLETE", "PRUNED": "PRUNED", "FAILED": "FAIL"}
    for number, end in ends.items():
        steps = [e["step"] for e in events if e["event"] == "report" and e["trial"] == number]
        if steps != list(range(EVERY, EVERY * len(steps) + 1, EVERY)):
            yield f"trial {number} reported steps {steps}"
        if end["status"] == "FAILED":
            yield f"trial {number} failed: {end['error']}"
        if (steps[-1:] == [MAX_STEPS]) != (end["status"] == "COMPLETE"):
            yield f"trial {number} is {end['status']} after step {steps[-1:]}"
        if told[number].state.name != names[end["status"]]:
            yield f"Optuna has trial {number} as {told[number].state.name}"
    stopped, pruned = asha(events), {n for n, e in ends.items() if e["status"] == "PRUNED"}
    if stopped != pruned:
        yield f"ASHA stops {sorted(stopped)}, but {sorted(pruned)} were stopped"
    yield from _check_best(study, folder)


def asha(events: list[dict[str, Any]]) -> set[int]:
    """Trials that ASHA (Li et al. 2020, arXiv 1810.05934) stops when it sees these reports.

    A rung every GRACE * FACTOR^k steps; the first report at or above one is compared with the
    best 1/FACTOR of those that came there before, in the highest rung it has reached.
    """
    milestones = [GRACE * FACTOR**k for k in range(9) if GRACE * FACTOR**k < MAX_STEPS]
    rungs: dict[float, dict[int, float]] = {m: {} for m in milestones}
    stopped = set()
    for event in events:
        if event["event"] != "report" or event["step"] >= MAX_STEPS:
            continue
        number, value = event["trial"], event["metrics"]["dev_accuracy"]
        for milestone in reversed(milestones):
            if event["step"] < milestone or number in rungs[milestone]:
                continue
            before = list(rungs[milestone].values())
            if before and value < np.nanpercentile(before, (1 - 1 / FACTOR) * 100):
                stopped.add(number)
            rungs[milestone][number] = value
            break
    return stopped


def _check_best(study: Path, folder: Path) -> Iterator[str]:
    best = json.loads((study / "study.json").read_text())["best"]
    top = max(e["value"] for e in journal(study) if e["event"] == "outcome" and e["value"])
    if best["dev_accuracy"] != top:
        yield f"best has {best['dev_accuracy']}, but a trial reached {top}"
    checkpoint = open_checkpoint(study / "best")  # weights only
    best_folder, data = str(study / "best"), str(folder / "data" / TASK)
    wanted = EvaluationJob(checkpoint=best_folder, data_folder=data, split="dev")
    found = evaluate_checkpoint(wanted, 1)
    said = checkpoint.metrics["dev_accuracy"]
    if not math.isclose(found.accuracy, said) or said != best["dev_accuracy"]:
        yield f"best/ has dev accuracy {found.accuracy}, its metrics say {said}"


def retrained(study: Path, folder: Path, number: int) -> Iterator[str]:
    """In what a trial differs from the same trial in one process that nobody disturbs."""
    events = [e for e in journal(study) if e["event"] == "report" and e["trial"] == number]
    trial = next(row for row in rows(study) if int(row["trial"]) == number)
    space = load_space(str(folder / "space.yaml"), TASK)
    point = {k: _typed(trial[k]) for k in space.distributions()}
    overrides = {**FIXED, "train.num_steps": MAX_STEPS, "data.root": None}
    overrides.pop("data.root")
    plain = to_dict(space.run_config(TASK, overrides, point))
    own = to_dict(open_checkpoint(study / "trials" / f"{number:04d}" / "last").config)
    if to_dict(parse_run_config(plain))["optim"] != own["optim"]:
        yield f"trial {number} was trained with other settings than trials.csv says"
    again = folder / "again" / f"{study.name}-{number}"
    again.parent.mkdir(exist_ok=True)
    job = Job(run_config=own, data_folder=str(folder / "data" / TASK), folder=str(again))
    runner = Runner(job)
    for event in events:
        report = runner.step()
        if report["dev_accuracy"] != event["metrics"]["dev_accuracy"]:
            yield f"trial {number} step {event['step']} is not what one process makes of it"
            break
    runner.close()


def _typed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
