"""Run folders for the tests, written by hand in the formats that dmx's commands leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmx.config import parse_run_config
from dmx.storage.journal import encode, read_journal
from dmx.study.folder import settings_event

SEARCHED = {
    "attention.block_size": ["choice", 32, 64],
    "optim.learning_rate": ["loguniform", 1e-4, 1e-2],
}
# (status, block size, learning rate, {step: dev accuracy})
TRIALS = (
    ("COMPLETE", 32, 1e-3, {2: 0.30, 4: 0.35, 8: 0.40}),
    ("PRUNED", 64, 5e-3, {2: 0.20}),
    ("COMPLETE", 64, 2e-3, {2: 0.45, 4: 0.50, 8: 0.48}),
    ("FAILED", 32, 9e-3, {}),
)


def metrics(step: int, accuracy: float, *, seconds: float = 0.1, memory: float = 500) -> dict:
    return {
        "steps": step,
        "train_loss": 1.0 / step,
        "dev_loss": 1.0,
        "dev_accuracy": accuracy,
        "best_dev_accuracy": accuracy,
        "best_step": step,
        "learning_rate": 1e-3,
        "train_seconds": seconds * step,
        "step_seconds": seconds,
        "peak_memory_mb": memory,
        "parameters": 1000,
    }


def config(attention: str = "butterfly-64", task: str = "text", **values: Any) -> dict[str, Any]:
    import yaml

    layers = {k.replace("__", "."): v for k, v in values.items()}
    found = parse_run_config({"task": task, "attention": attention}, layers)
    return yaml.safe_load(found.to_yaml())


def write_checkpoint(folder: Path, plain: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    import yaml

    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(plain)))
    (folder / "metrics.json").write_text(json.dumps(found))


def write_journal(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    path.write_bytes(b"".join(encode(e) for e in events))


def make_study(
    folder: Path,
    trials: Sequence[tuple[str, int, float, Mapping[int, float]]] = TRIALS,
    *,
    data: str = "sample-bbc, not LRA",
    error: str = "the loss is not finite",
    dev: tuple[int, float] | None = None,
    searched: Mapping[str, Any] = SEARCHED,
    final: Mapping[str, Any] | None = None,
    tested: bool = True,
    environment: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A finished study; `settings` and `final` override values of these events.

    dev: examples of the dev split, and the share of its largest class.
    """
    folder.mkdir(parents=True)
    settings = {
        "task": "text",
        "attention": "butterfly",
        "overrides": {"train.eval_every_steps": 2, "train.num_steps": 8},
        "searched": dict(searched),
        "num_trials": len(trials),
        "max_steps": 8,
        "grace_steps": 2,
        "scheduler": "asha",
        "sampler": "tpe",
        "seed": 0,
        "data": data,
        "data_checksum": "abc",
        **settings,
    }
    events: list[dict[str, Any]] = [
        {
            **{"event": "settings", "kind": "study", "settings": settings, "options": {}},
            "attention": settings["attention"],
            "environment": {"dmx": "0.1.0", "gpus": []} | (environment or {}),
            "argv": ["tune.py", "--task", "text"],
        },
        {"event": "session", "time": 0.0},
    ]
    outcomes = []
    for number, (status, size, rate, curve) in enumerate(trials):
        params = {"attention.block_size": size, "optim.learning_rate": rate}
        events.append({"event": "started", "trial": number, "params": params})
        for step, accuracy in curve.items():
            found = metrics(step, accuracy, seconds=0.1 * (number + 1), memory=600 - number)
            events.append({"event": "report", "trial": number, "step": step, "metrics": found})
        if status != "RUNNING":
            text, value = error if status == "FAILED" else "", max(curve.values(), default=None)
            outcome = {"event": "outcome", "trial": number, "status": status, "value": value}
            outcomes.append({**outcome, "error": text})
    scored = [(max(c.values()), -n) for n, (s, *_, c) in enumerate(trials) if c and s != "FAILED"]
    final = {
        **{"event": "final", "trial": -max(scored)[1] if scored else 0, "step": 4, "time": 12.0},
        **{"test_accuracy": 0.47, "test_loss": None},
        **{"seeds": [], "dev_accuracies": [], "test_accuracies": [], **(final or {})},
    }
    write_journal(folder / "journal.jsonl", [*events, *outcomes, *([final] * tested)])
    plain = config(train__num_steps=8, optim__warmup_steps=2, optim__learning_rate=2e-3)
    beside = {} if dev is None else {"num_dev": dev[0], "dev_majority": dev[1]}
    write_checkpoint(folder / "best", plain, beside)
    return folder


def change_settings(folder: Path, **more: Any) -> Path:
    """The same run, had it been started with other settings."""
    events, _ = read_journal(folder / "journal.jsonl")
    found = events[0]["settings"] | more
    write_journal(folder / "journal.jsonl", [{**events[0], "settings": found}, *events[1:]])
    return folder


def make_run(
    folder: Path,
    test: float | None = 0.6,
    *,
    data: str = "text",
    seed: int = 2023,
    dev: float = 0.5,
    **values: Any,
) -> Path:
    """A single run with TensorBoard scalars; unfinished without `test`."""
    from dmx.tensorboard import RunWriter

    plain = config(train__seed=seed, **values)
    found = {"data": data, "is_sample": data.endswith("not LRA"), "best_step": 4}
    write_checkpoint(folder / "best", plain, {**found, **metrics(4, dev)})
    settings = {"config": plain, "data": data, "data_checksum": "abc"}
    record = settings_event("run", settings)
    write_journal(folder / "journal.jsonl", [{**record, "environment": {}, "argv": []}])
    writer = RunWriter(folder)
    for step, accuracy in ((2, 0.4), (4, dev)):
        writer.scalars(metrics(step, accuracy), step)
    writer.close()
    if test is not None:
        result = {**found, **metrics(4, dev), "test_accuracy": test, "test_loss": 0.7}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def make_curriculum(folder: Path) -> Path:
    """Three stages: the first passed at once, the second at the second try, the third waits."""
    folder.mkdir(parents=True)
    data = {"label": "pathfinder32-cl6-d4 (1,000 images)", "checksum": "ab" * 32}
    task = "pathfinder32-cl6-d4"
    parents = {"easy": None, "harder": "easy", "last": "harder"}
    stages = [
        {"name": name, "task": task, "parent": parent, "attention": "butterfly-32"}
        for name, parent in parents.items()
    ]
    events: list[dict[str, Any]] = [
        {"event": "created", "time": 0.0},
        {
            **{"event": "session", "time": 0.0, "host": "h", "pid": 1, "argv": ["c.yaml"]},
            **{"stages": stages, "last_stage": "last"},
        },
    ]

    def attempt(stage: str, number: int, source: dict, curve: list[float], passed: bool) -> None:
        plain = config("butterfly-32", "pathfinder32-cl6-d4")
        common = {"stage": stage, "attempt": number}
        events.append(
            {
                **{"event": "started", **common, "retry": number, "config": plain},
                **{"source": source, "spec": {"code": "abc123"}, "data": data, "time": 1.0},
            }
        )
        for i, accuracy in enumerate(curve, start=1):
            found = metrics(100 * i, accuracy)
            events.append({"event": "report", **common, "step": 100 * i, "metrics": found})
        best = {"attempt": number, "path": f"stages/{stage}/best", "dev_accuracy": max(curve)}
        reason = f"threshold: best_dev_accuracy {max(curve):.4f} is "
        events.append(
            {
                **{"event": "decided", **common, "passed": passed, "checkpoint": best},
                "reason": reason + ("within bounds" if passed else "below 0.8"),
                "next": "promote" if passed else "retry",
            }
        )

    attempt("easy", 0, {}, [0.6, 0.9], True)
    attempt("harder", 0, {"stage": "easy", "attempt": 0, "path": "x"}, [0.5, 0.7], False)
    attempt("harder", 1, {"stage": "easy", "attempt": 0, "path": "x"}, [0.6, 0.85], True)
    events.append(
        {"event": "tested", "stage": "easy", "on": "easy", "accuracy": 0.88, "attempt": 0}
    )
    write_journal(folder / "journal.jsonl", events)
    (folder / "lineage.json").write_text("{}")  # a view; nothing is read from it
    return folder


def curriculum_events(
    *stages: tuple[str, str | None, list[float]], last: str, seed: int = 1, begun: float = 0.0
) -> list[dict[str, Any]]:
    """The journal of a curriculum in one session: (stage, parent, dev accuracies), all promoted.

    A report every 100 steps and 10 seconds of training; 15 seconds pass from event to event.
    """
    events: list[dict[str, Any]] = []

    def add(kind: str, **values: Any) -> None:
        events.append({"event": kind, **values, "time": begun + 15.0 * len(events)})

    task = "pathfinder32-cl6-d4"
    brief = [
        {"name": name, "task": task, "parent": parent, "attention": "butterfly-32"}
        for name, parent, _ in stages
    ]
    add("session", host="h", pid=1, argv=["c.yaml"], stages=brief, last_stage=last)
    for name, parent, curve in stages:
        plain = config("butterfly-32", task, train__seed=seed)
        source = {} if parent is None else {"stage": parent, "attempt": 0, "path": f"{parent}/best"}
        common = {"stage": name, "attempt": 0}
        data = {"label": f"{task} (1,000 images)", "checksum": "ab" * 32}
        spec = {**plain, "name": name, "code": "abc123", "init_from": parent}
        add("started", **common, retry=0, config=plain, source=source, spec=spec, data=data)
        for i, accuracy in enumerate(curve, start=1):
            add("report", **common, step=100 * i, metrics=metrics(100 * i, accuracy))
        best = {"attempt": 0, "path": f"{name}/best", "dev_accuracy": max(curve), "step": 100}
        verdict = {"passed": True, "reason": "always", "next": "promote"}
        add("decided", **common, **verdict, checkpoint=best)
    return events


def write_curriculum(folder: Path, events: Sequence[Mapping[str, Any]]) -> Path:
    """A run folder with that journal."""
    (folder / "stages").mkdir(parents=True)
    write_journal(folder / "journal.jsonl", events)
    return folder
