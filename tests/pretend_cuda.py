"""Tensors that say they are on a GPU and compute on the CPU: what a machine without one can prove.

A PretendTensor holds a CPU tensor and reports the device `cuda`, so dmx takes its CUDA paths.
Within `PretendCuda` an operation that a GPU would refuse (operands on two devices) raises, and
every operation for which the host would wait for the GPU is counted. Operations whose result
decides a shape work, and so does autograd, neither of which torch's FakeTensorMode can do for a
GPU in a CPU build; and the results can be compared with the CPU's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
GPU = torch.device("cuda", 0)

WAITS = {
    aten._local_scalar_dense: "item",
    aten.nonzero: "nonzero",
    aten.equal: "equal",
    aten.bincount: "bincount",
    aten.masked_select: "masked_select",
}
"""Operations whose result has to reach the host before it can go on."""


class DeviceMismatch(Exception):
    """Operands lie on two devices; a GPU would refuse them, or copy one of them while all waits."""


class PretendTensor(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        # To autograd's engine it is a meta tensor, since a CPU build has no engine for CUDA; the
        # keys, by which autocast goes, and what `.device` says in Python are a GPU's.
        meta = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        made: PretendTensor = torch.Tensor._make_subclass(
            cls, meta, False, device_for_backend_keys=GPU
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """What it says; torch's own code in C++ sees through it."""
        return GPU

    def tolist(self) -> Any:
        """As torch does it for a GPU: a copy to the host first."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        """What torch has asks the keys for a device, and then for a driver."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=GPU)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


class PretendCuda(TorchDispatchMode):
    """Within it `device="cuda"` makes PretendTensors.

    Attributes:
        waits: how often the host would have waited for the GPU, by what for.
        calls: how many operations there were, which is how many kernels, roughly.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> PretendCuda:
        # torch would look for a driver before it makes the first tensor on `cuda`.
        self._patches = (
            mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
            mock.patch.object(torch, "tensor", _tensor),  # which hides its copy from any mode
        )
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.overloadpacket)] += 1
        return _run(func, args, kwargs or {}, self.waits)


_torch_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    made = _torch_tensor(data, **options)
    return made if device is None else made.to(device)


def _run(func: Any, args: Any, kwargs: Mapping[str, Any], waits: Counter[str]) -> Any:
    leaves = tree_flatten((args, kwargs))[0]
    pretended = [x for x in leaves if isinstance(x, PretendTensor)]
    plain = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, PretendTensor)]
    packet = func.overloadpacket
    if packet is not aten.copy_ and pretended and any(x.dim() for x in plain):
        raise DeviceMismatch(f"{func}: a tensor on the CPU among tensors on the GPU")
    wanted = kwargs.get("device")
    on_gpu = bool(pretended) if wanted is None else torch.device(wanted).type in ("cuda", "meta")
    if pretended:
        _count(packet, args, kwargs, on_gpu, bool(plain), waits)
    elif packet is aten._to_copy and on_gpu and not kwargs.get("non_blocking"):
        waits["copy to the GPU"] += 1
    real = {k: torch.device("cpu") if k == "device" and on_gpu else v for k, v in kwargs.items()}
    bare = tree_map(lambda x: x.held if isinstance(x, PretendTensor) else x, (args, real))
    out = func(*bare[0], **bare[1])
    if not on_gpu:
        return out
    wrapped = tree_map(lambda x: PretendTensor(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, dict(kwargs), wrapped)


def _count(
    packet: Any,
    args: Any,
    kwargs: Mapping[str, Any],
    on_gpu: bool,
    mixed: bool,
    waits: Counter[str],
) -> None:
    if packet in WAITS:
        waits[WAITS[packet]] += 1
    elif packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        waits["repeat_interleave"] += 1
    elif packet in (aten.index, aten.index_put, aten.index_put_):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        waits["mask as index"] += len(masks)
    elif not on_gpu or (packet is aten.copy_ and mixed):
        waits["copy between devices"] += 1


def to_gpu(x: Tensor) -> Tensor:
    """A PretendTensor with the same values; changing one does not change the other."""
    return PretendTensor(x.detach().clone())


def to_cpu(x: Tensor) -> Tensor:
    """The values of a tensor, pretended or not."""
    return x.held if isinstance(x, PretendTensor) else x.detach()


def module_to_gpu(model: nn.Module) -> nn.Module:
    """Put pretended parameters and buffers in place of the module's; shared ones stay shared."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                made = moved.setdefault(id(value), nn.Parameter(to_gpu(value)))
                module._parameters[name] = made
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = moved.setdefault(id(buffer), to_gpu(buffer))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name; zeros where there is none."""
    return {
        name: torch.zeros(p.shape) if p.grad is None else to_cpu(p.grad)
        for name, p in model.named_parameters()
    }
