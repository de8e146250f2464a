"""One of several processes with a GPU each, which train together over NCCL, without Ray.

python -m tests.gpu.nccl_process FOLDER RANK SIZE: writes FOLDER/RANK.pt; see test_nccl.py.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dmx.data.store import open_store
from dmx.training.process_group import TorchProcessGroup
from dmx.training.trainer import Trainer
from tests.tiny import TASK, config

CHANGES = {"attention__dropout": 0.0, "train__device": "cuda", "train__precision": "fp32"}
STEPS = 3


def main() -> None:
    """Every exchange once, then a run."""
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.cuda.set_device(rank)  # here all see each other's GPUs; in a gang each only its own
    dist.init_process_group(
        "nccl",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    group = TorchProcessGroup()
    weights = [torch.nn.Parameter(torch.full((2,), float(rank), device="cuda")) for _ in range(2)]
    weights[1].grad = torch.ones(2, device="cuda")
    group.add_gradients(weights)
    group.broadcast([weights[0].data])
    found = {
        "total": group.total(torch.tensor([float(rank), 1.0], device="cuda")).tolist(),
        "largest": group.largest(float(rank)),
        "leader": group.broadcast_object(f"of rank {rank}"),
        "copied": weights[0].tolist(),
        "gradients": [None if w.grad is None else w.grad[0].item() for w in weights],
        "device": weights[0].device.index,
    }
    made = Trainer(config(**CHANGES), open_store(folder / "data" / TASK), group=group)
    made.follow_main()
    found["reports"] = [made.advance() for _ in range(STEPS)]
    made.close()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
