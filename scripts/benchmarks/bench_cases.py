"""What the benchmarks run: batches of each task's shape, and a training step of either code.

Imported by bench_reference.py and bench_attention.py; it is no command. The reference is the
user's own checkout of github.com/tsumansapkota/Solving-LRA-PathX, imported as it is.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dmx.data.pathfinder import Generator
from dmx.model import Classifier
from dmx.nn.optim import OptimConfig, build_optimizer
from dmx.training.reference import load_model

Step = Callable[[], None]

LRA = {
    "num_layers": 2, "num_head": 2, "head_dim": 32, "attention_dropout": 0.1,
    "embedding_dropout": 0.0, "mlp_dropout": 0.0,
}  # fmt: skip
"""run_tasks.py without flags: --dropout_prob is 0.0, lra_config.py has attention_dropout 0.1."""

PATHX = {
    "num_layers": 4, "num_head": 4, "head_dim": 16, "attention_dropout": 0.1,
    "embedding_dropout": 0.1, "mlp_dropout": 0.1,
}  # fmt: skip
"""The flags of the Path-X stages in the reference's README."""

ATTENTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "none": {},
    "linear": {},
    "linformer": {"linformer_k": 256},
    "nystrom": {"num_landmarks": 64, "conv_kernel_size": 35},
    "performer": {"rp_dim": 256, "kernel_type": "relu"},
    "reformer": {"num_hash": 2},
}
"""Sizes as in lra_config.py."""


@dataclass(frozen=True)
class Case:
    """A task's shape.

    Attributes:
        length: tokens, padding included. block: of butterfly, as the paper's runs have it.
        batch: sequences, a fraction of the recipe's so that the reference fits 16 GB.
        images: the Pathfinder set whose images are the input.
    """

    length: int
    block: int
    batch: int
    recipe: dict[str, Any]
    vocab_size: int = 512
    num_classes: int = 2
    images: str = ""


CASES = {
    "pathX-nogap": Case(16384, 128, 4, PATHX, images="pathX-cl14_nogap"),
    "pathX-alpha0.75": Case(16384, 128, 4, PATHX, images="pathX-cl14_alpha0.75"),
    "pathX-alpha1.25": Case(16384, 128, 4, PATHX, images="pathX-cl14_alpha1.25"),
    "text": Case(4096, 256, 16, LRA),
    "pathfinder32": Case(1024, 128, 64, LRA, images="pathfinder32-curv_contour_length_14"),
    "image": Case(1024, 32, 64, LRA, num_classes=10),
    "listops": Case(2048, 64, 32, LRA, vocab_size=32, num_classes=10),
}


def batch_of(name: str, batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, L] int64 and labels [B], the same on each call.

    Pathfinder images are the generator's own. Bytes of text are uniform, in lengths spread as
    IMDB's are (lognormal, median 980, mean about 1,300, cut at 4,000); ListOps has 501 to 1,999
    tokens, 1,067 on average. Pixels of `image` are never 0, so that packing gains nothing there.
    """
    case, draw = CASES[name], np.random.default_rng(0)
    count = batch or case.batch
    labels = torch.from_numpy(draw.integers(0, case.num_classes, count))
    if case.images:
        generator = Generator(case.images, 123, render="original")
        images = [generator.image(index)[0].reshape(-1) for index in range(count)]
        return torch.from_numpy(np.stack(images)).long(), labels
    if name == "text":
        lengths = draw.lognormal(np.log(980), 0.75, count).clip(60, 4000)
    elif name == "listops":
        lengths = draw.gamma(8, 1067 / 8, count).clip(501, 1999)
    else:
        lengths = np.full(count, case.length)
    high = 16 if name == "listops" else 256
    ids = draw.integers(1, high, (count, case.length))
    ids[np.arange(case.length) >= lengths[:, None].astype(int)] = 0
    return torch.from_numpy(ids), labels


def peak_mb() -> float:
    """The most resident memory that this process ever had."""
    # Not getrusage's ru_maxrss: a child begins with its parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def write_section(path: Path, name: str, content: str) -> None:
    """Replace what lies between the markers of a section; append it where the file has none."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Benchmarks\n"
    if start not in text:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    head, tail = text.split(start)[0], text.split(end)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{start}\n{content}\n{end}{tail}", encoding="utf-8")


def reference_config(name: str, attention: str) -> dict[str, Any]:
    """The model config that the reference's run_tasks.py would build, in fp32."""
    case = CASES[name]
    inner: dict[str, Any] = ATTENTIONS.get(attention, {})
    if attention == "butterfly":
        inner = {"butterfly_radix": case.block, "sub_attn_type": "softmax"}
    return {
        "learn_pos_emb": True, "tied_weights": False, "embedding_dim": 64, "transformer_dim": 64,
        "transformer_hidden_dim": 128, "vocab_size": case.vocab_size, "max_seq_len": case.length,
        "dropout_prob": 0.0, "pooling_mode": "MEAN", "num_classes": case.num_classes,
        "attention_grad_checkpointing": False, "mixed_precision": False, "seed_model": 2023,
        "pretrained_init": None, "attn_type": attention, **case.recipe, **inner,
    }  # fmt: skip


def reference_model(checkout: Path, name: str, attention: str) -> torch.nn.Module:
    """The reference's ModelForSC, which returns losses and accuracies.

    Raises:
        ImportError: this attention needs a package that is not installed.
    """
    warnings.filterwarnings("ignore", message=".*torch.cuda.amp.autocast.*")
    warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
    code = checkout / "LRA" / "code"
    if not (code / "model_wrapper.py").is_file():
        sys.exit(f"{checkout} is no checkout of Solving-LRA-PathX: {code} has no model_wrapper.py")
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
    with contextlib.suppress(ImportError):  # the module has moved since the reference was written
        moved = importlib.import_module("transformers.models.reformer.modeling_reformer")
        sys.modules.setdefault("transformers.modeling_reformer", moved)
    with contextlib.redirect_stdout(io.StringIO()):
        from model_wrapper import ModelForSC

        return ModelForSC(copy.deepcopy(reference_config(name, attention)))


def our_model(name: str, attention: str, state: dict[str, torch.Tensor]) -> Classifier:
    """Our model with the reference's weights."""
    return load_model(reference_config(name, attention), state).train()


def reference_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, C], which its forward does not give away."""
    return model.seq_classifer(model.model(ids, (ids != 0).float()))


def reference_step(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> Step:
    """Forward, backward and AdamW as run_tasks.py has them, without the scaler of fp16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6, weight_decay=1e-3)
    mask = (ids != 0).float()

    def step() -> None:
        optimizer.zero_grad()
        model(ids, mask, labels)["loss"].mean().backward()
        optimizer.step()

    return step


def our_step(model: Classifier, ids: torch.Tensor, labels: torch.Tensor) -> Step:
    """Forward, backward and AdamW as dmx.training.trainer has them."""
    config = OptimConfig(learning_rate=1e-4, weight_decay=1e-3, warmup_steps=100)
    optimizer, schedule = build_optimizer(model.parameters(), config, 1000)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(ids), labels).backward()
        optimizer.step()
        schedule.step()

    return step
