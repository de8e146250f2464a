"""The CUDA paths without a GPU: devices match, results are the CPU's, and the host rarely waits."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmx.attention import base
from dmx.attention.base import fused_attention
from dmx.nn.optim import OptimConfig, build_optimizer
from dmx.schema import to_dict
from dmx.training.job import Job
from dmx.training.runner import Runner
from tests.attention.cases import CASES, LENGTH, NAMES, PACKING, masks
from tests.attention.test_packed_equals_dense import ids_of, models
from tests.pretend_cuda import (
    DeviceMismatch,
    PretendCuda,
    PretendTensor,
    gradients,
    module_to_gpu,
    to_cpu,
    to_gpu,
)
from tests.tiny import config


def loss_of(logits, weight):
    return (logits * weight).sum()


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_dense_and_packed_forward_and_backward(name):
    """On masks with empty rows and groups, against the dense formula on the CPU.

    What is tested besides: nothing lies on the wrong device, and a packed pass waits for the GPU
    no more often with more layers: only where tokens are counted, once for each grouping.
    """
    ids = ids_of(masks()["holes"])
    executions = ("dense", "packed") if name in PACKING else ("dense",)
    pair = models(CASES[name], LENGTH, layers=2, executions=executions)
    torch.manual_seed(1)
    expected = pair[0](ids)
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    loss_of(expected, weight).backward()
    theirs = gradients(pair[0])
    groupings = {b.attention.mixer.grouping(LENGTH) for b in pair[0].encoder.blocks()}
    for model in models(CASES[name], LENGTH, layers=2, executions=executions):
        with PretendCuda() as gpu:
            module_to_gpu(model)
            inputs, gpu_weight = to_gpu(ids.to(torch.uint8)), to_gpu(weight)
            torch.manual_seed(1)
            logits = model(inputs)
            waits = gpu.waits.total()
            loss_of(logits, gpu_weight).backward()
        assert isinstance(logits, PretendTensor)
        torch.testing.assert_close(to_cpu(logits), expected.detach(), rtol=0, atol=1e-5)
        for key, gradient in gradients(model).items():
            limit = 1e-5 * max(1.0, theirs[key].abs().max().item())
            assert (gradient - theirs[key]).abs().max() <= limit, key
        assert waits <= (1 + 4 * len(groupings) if model.encoder.packs else 0), gpu.waits
        assert gpu.waits.total() == waits, "the backward pass never waits"


class CountOperations(TorchDispatchMode):
    """How many operations autograd's engine and the formulas issue; views as well."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(name, execution, lengths):
    """Of a forward and a backward pass on the pretended GPU over sequences of these lengths."""
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    (model,) = models(CASES[name], LENGTH, layers=2, executions=[execution])
    with PretendCuda():
        module_to_gpu(model)
        inputs = to_gpu(ids_of(mask))
        with CountOperations() as counter:
            model(inputs).sum().backward()
    return counter.count


FEW, MANY = [9, 15, 25, 31, 41, 47, 57, 63] * 4, list(range(1, 65, 2))
"""32 sequences of 8 and of 32 lengths; each of the four widths to which groups of up to 64 tokens
are padded (16, 32, 48, 64) has several."""


@pytest.mark.parametrize("name", NAMES)
def test_what_auto_issues_does_not_grow_with_the_number_of_lengths(name):
    assert operations(name, "auto", MANY) == operations(name, "auto", FEW)


def test_what_multiplies_with_the_lengths_is_noticed():
    """What `auto` avoids: linear attention, packed, does the same for each length."""
    few, many = (operations("linear", "packed", lengths) for lengths in (FEW, MANY))
    assert many > 2 * few > 2 * operations("linear", "auto", MANY)


def test_an_optimizer_step_does_not_wait():
    model = models(CASES["butterfly"], LENGTH)[1]
    with PretendCuda() as gpu:
        module_to_gpu(model)
        optimizer, schedule = build_optimizer(model.parameters(), OptimConfig(), 2000)
        model(to_gpu(ids_of(masks()["tails"]))).sum().backward()
        before = gpu.waits.copy()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert gpu.waits == before


def test_more_groups_than_a_grid_of_cuda_has(monkeypatch):
    """In pieces, with their masks; a single call on a CPU."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 11, 2, 5, 4)
    keep = torch.rand(11, 1, 1, 5) < 0.7
    keep[..., 0] = True
    expected, unmasked = fused_attention(q, k, v, keep), fused_attention(q, k, v)
    monkeypatch.setattr(base, "MOST_GROUPS", 4)
    sizes = []
    real = base.F.scaled_dot_product_attention

    def attention(query, *args, **kwargs):
        sizes.append(query.shape[0])
        return real(query, *args, **kwargs)

    monkeypatch.setattr(base.F, "scaled_dot_product_attention", attention)
    with PretendCuda():
        inputs = [to_gpu(x) for x in (q, k, v)]
        torch.testing.assert_close(to_cpu(fused_attention(*inputs, to_gpu(keep))), expected)
        torch.testing.assert_close(to_cpu(fused_attention(*inputs)), unmasked)
    assert sizes == [4, 4, 3] * 2


def test_a_closed_run_has_given_up_its_weights_when_the_cache_is_emptied(
    tiny_store, tmp_path, monkeypatch
):
    """An optimizer is part of a cycle: only the collector frees what it holds."""
    job = Job(
        run_config=to_dict(config()), data_folder=str(tiny_store.folder), folder=str(tmp_path / "r")
    )
    runner = Runner(job)
    weights = weakref.ref(runner.trainer.model.head[0].weight)
    left = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(weights()))
    gc.disable()  # by chance it might run in between
    try:
        runner.close()
    finally:
        gc.enable()
    assert left == [None]


def test_what_a_gpu_refuses_is_noticed():
    with PretendCuda() as gpu:
        x = to_gpu(torch.ones(3))
        with pytest.raises(DeviceMismatch, match="index_select"):
            x.index_select(0, torch.tensor([0, 2]))
        with pytest.raises(DeviceMismatch):
            torch.add(x, torch.ones(3))
        torch.add(x, torch.tensor(1.0))  # a scalar may come from anywhere
        assert gpu.waits.total() == 0
        x[x > 0].sum().item()
        torch.arange(3, device=x.device).repeat_interleave(to_gpu(torch.tensor([1, 0, 2])))
    assert gpu.waits == {"mask as index": 1, "item": 1, "repeat_interleave": 1}
