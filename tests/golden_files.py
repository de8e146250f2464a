"""Finds the reference outputs: the copies in tests/golden, else ../shared/golden of a checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_HERE = Path(__file__).resolve().parent
FOLDERS = (
    _HERE / "golden" / "models",
    _HERE.parents[1] / "shared" / "golden" / "models",
    _HERE.parent / ".gpu" / "golden" / "models",  # what scripts/benchmarks/gpu_pack.py carries
)

# Every golden model file; those not in the repository are skipped where no other folder has them.
NAMES = [
    "butterfly-sparse-13",
    "butterfly-sparse-14",
    "butterfly-text-12",
    "butterfly-text-15",
    "linear-sparse-5",
    "linear-text-4",
    "linformer-sparse-9",
    "linformer-text-8",
    "none-sparse-3",
    "none-text-2",
    "nystrom-sparse-7",
    "nystrom-text-6",
    "performer-sparse-11",
    "performer-text-10",
    "softmax-sparse-1",
    "softmax-text-0",
    "retrieval-butterfly",
]


def golden(name: str) -> dict[str, Any]:
    """The arrays of a golden file as tensors, `config*` and `optimizer` as dicts, `state` apart."""
    for folder in FOLDERS:
        path = folder / f"{name}.npz"
        if path.is_file():
            break
    else:
        pytest.skip(f"{name}.npz is neither in tests/golden nor in ../shared/golden")
    content: dict[str, Any] = {"state": {}}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            if key.startswith("state/"):
                content["state"][key[6:]] = torch.from_numpy(arrays[key])
            elif arrays[key].ndim == 0:
                content[key] = json.loads(str(arrays[key]))
            else:
                content[key] = torch.from_numpy(arrays[key])
    return content
