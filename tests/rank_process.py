"""One of several processes that train together over gloo, without Ray; see test_ranks.py.

python -m tests.rank_process FOLDER RANK SIZE: writes FOLDER/RANK.pt, a mapping of case to result.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dmx.data.store import open_store
from dmx.schema import to_dict
from dmx.training.job import Job
from dmx.training.process_group import PeerLost, TorchProcessGroup
from dmx.training.runner import Runner
from dmx.training.trainer import Diverged, Trainer
from tests.tiny import TASK, config

PLAIN = {"attention__dropout": 0.0, "train__clip_gradient_norm": 0.5}
DROPOUT = {"attention__dropout": 0.2, "model__dropout": 0.1, "model__embedding_dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "bucketed": {**PLAIN, "data__order": "bucketed", "train__micro_batch_size": 2},
    "redraws": {
        "attention": {"name": "performer", "num_features": 16, "redraw_every_steps": 3},
        "train__clip_gradient_norm": 0.5,
    },
    "eval": {**PLAIN, "train__eval_batch_size": 4, "train__num_steps": 4},
}
TOO_LARGE = {**PLAIN, "optim__learning_rate": 1e30}


def train(store: Any, group: TorchProcessGroup, changes: dict[str, Any], resume: Any = None) -> Any:
    """(reports, weights) of a run to its end."""
    made = Trainer(config(**changes), store, group=group)
    try:
        if group.is_main and resume is not None:
            made.load_state(resume[1], "a state")
            made.model.load_state_dict(resume[0])
        made.follow_main()
        reports, states = [], []
        while not made.finished:
            reports.append(made.advance())
            states.append(({k: v.clone() for k, v in made.model.state_dict().items()}, None))
            if made.step == 4:
                middle = torch.load(_saved(made.state()), weights_only=True)
                states[-1] = (states[-1][0], middle)
        return reports, states
    finally:
        made.close()


def _saved(value: Any) -> Any:
    import io

    content = io.BytesIO()
    torch.save(value, content)
    content.seek(0)
    return content


def gradients(group: TorchProcessGroup) -> list[Any]:
    """Of four weights: used by rank 0, by nobody, by all, and frozen."""
    weights = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    if group.is_main:
        weights[0].grad = torch.full((2, 2), 5.0)
    weights[2].grad = torch.full((2, 2), 10.0**group.rank)
    group.add_gradients([*weights, frozen])
    return [w.grad for w in (*weights, frozen)]


def one_runs_out_of_memory(store: Any, group: TorchProcessGroup) -> Any:
    """Only rank 1, and only for more than one sequence."""
    made = Trainer(config(**PLAIN), store, group=group)
    forward = made.passes._run

    def run(ids: torch.Tensor, other: Any) -> torch.Tensor:
        if group.rank == 1 and made.model.training and ids.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(ids, other)

    made.passes._run = run
    reports = [made.advance() for _ in range(2)]
    made.close()
    return reports


def runner(data_folder: str, folder: Path, group: TorchProcessGroup, evaluations: int) -> Any:
    """Reports of a run in a folder, begun or continued."""
    job = Job(run_config=to_dict(config(**PLAIN)), data_folder=data_folder, folder=str(folder))
    made = Runner(job, group=group)
    reports = [made.step() for _ in range(evaluations)]
    made.close()
    return reports


def cut(data_folder: str, folder: Path, group: TorchProcessGroup) -> Any:
    """Reports of a run with dropout that is cut off after every step, and its weights."""
    plain = to_dict(config(**DROPOUT))
    job = Job(run_config=plain, data_folder=data_folder, folder=str(folder), slice_seconds=0.0)
    reports: list[Any] = []
    while not reports or not reports[-1]["done"]:
        made = Runner(job, group=group)
        report = made.step()
        while "under_way" not in report and not report["done"]:  # repeated, or new
            reports.append(report)
            report = made.step()
        if report["done"]:
            reports.append(report)
            weights = {k: v.clone() for k, v in made.trainer.model.state_dict().items()}
        made.close()
    new = [r for i, r in enumerate(reports) if r["steps"] not in [x["steps"] for x in reports[:i]]]
    return new, weights


def fails(store: Any, group: TorchProcessGroup) -> str:
    """A loss that is no number, seen by every process at the same step."""
    try:
        train(store, group, TOO_LARGE)
    except Diverged as error:
        return str(error)
    return "did not"


def main() -> None:
    """All cases in one process, since its start costs more than they do."""
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    group = TorchProcessGroup()
    data_folder = folder / "data" / TASK
    store = open_store(data_folder)
    found: dict[str, Any] = {name: train(store, group, changes) for name, changes in CASES.items()}
    found["dropout"] = train(store, group, DROPOUT)
    resume = found["dropout"][1][1]
    torch.manual_seed(rank)  # another process has another random state
    found["dropout again"] = train(store, group, DROPOUT, resume)
    found["gradients"] = gradients(group)
    found["out of memory"] = one_runs_out_of_memory(store, group)
    found["begun"] = runner(str(data_folder), folder / "begun", group, 2)
    found["continued"] = runner(str(data_folder), folder / "continued", group, 3)
    found["cut"] = cut(str(data_folder), folder / "cut", group)
    found["diverged"] = fails(store, group)
    too_many = Job(
        run_config=to_dict(config(train__batch_size=2)),
        data_folder=str(data_folder),
        folder=str(folder / "few"),
    )
    failed = Runner(too_many, group=group)
    found["too many"] = failed.step()["failure"]
    if rank == size - 1:
        torch.save(found, folder / f"{rank}.pt")
        os._exit(9)  # as a killed process: no goodbye
    try:
        for _ in range(100):
            group.total(torch.zeros(3))
        found["lost"] = "nothing noticed"
    except PeerLost:
        found["lost"] = "noticed"
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
