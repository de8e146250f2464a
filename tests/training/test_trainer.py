"""The training loop: exact resume, accumulation, whole evaluation, NaN, patience, seeds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmx.config import parse_run_config
from dmx.errors import CheckpointError, ConfigError
from dmx.nn import device
from dmx.nn.device import pick_device
from dmx.schema import to_dict
from dmx.storage.journal import CLAIM_FILE
from dmx.training import passes
from dmx.training.checkpoint import open_checkpoint
from dmx.training.evaluation import EvaluationJob, evaluate_checkpoint
from dmx.training.job import Job
from dmx.training.process_group import SINGLE_PROCESS
from dmx.training.runner import Runner
from dmx.training.trainer import Diverged, build_model
from tests.tiny import LENGTH, SETTINGS, SIZES, TASK, config, examples, one_sentence, trainer

MPS = torch.device("mps")

TIMES = {
    "train_seconds",
    "step_seconds",
    "samples_per_second",
    "samples_per_second_per_worker",
    "tokens_per_second",
    "peak_memory_mb",
    "process_seconds",
}


def facts(metrics):
    """Metrics without those that a clock decides."""
    return {k: v for k, v in metrics.items() if k not in TIMES}


def same_state(a, b) -> bool:
    """Bit for bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same_state(v, b[k]) for k, v in a.items() if k != "train_seconds"
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


# Dropout everywhere and order bucketed: whatever is random takes part.
RANDOM = {
    "attention__dropout": 0.2,
    "model__dropout": 0.1,
    "model__mlp_dropout": 0.1,
    "model__embedding_dropout": 0.1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__order": "bucketed", "train__micro_batch_size": 4},
        {"data__order": "reference", "optim__anneal": "cos", "train__clip_gradient_norm": 0.5},
        {"attention": "performer", "attention__num_features": 8},
        {
            "attention": "performer",
            "attention__num_features": 8,
            "attention__redraw_every_steps": 3,
        },
        {"attention": "reformer", "model__max_length": 256},
    ],
    ids=["plain", "bucketed", "reference", "performer", "redraws", "reformer"],
)
def test_n_and_resume_and_n_equals_2n_bit_for_bit(tiny_store, tmp_path, changes):
    changes = {**RANDOM, **changes}
    if "attention" in changes:
        changes["attention__block_size"] = None
    made = {k: v for k, v in changes.items() if v is not None}
    with experiment(tiny_store, made) as whole:
        reports = [whole.advance() for _ in range(4)]
        assert whole.finished
    with experiment(tiny_store, made) as first:
        before = [first.advance() for _ in range(2)]
        first.save(tmp_path / "last")
        torch.manual_seed(99)  # another process has another random state
    with experiment(tiny_store, made) as second:
        second.load(open_checkpoint(tmp_path / "last"))
        assert second.step == 4 and not second.finished
        after = [second.advance() for _ in range(2)]
        assert list(map(facts, before + after)) == list(map(facts, reports))
        assert same_state(second.model.state_dict(), whole.model.state_dict())
        assert same_state(second.state(), whole.state())


def experiment(store, changes):
    if "attention" not in changes:
        return trainer(store, **changes)
    from contextlib import contextmanager

    from dmx.config import parse_run_config
    from dmx.training.trainer import Trainer
    from tests.tiny import SETTINGS, TASK

    @contextmanager
    def other():
        settings = {k: v for k, v in SETTINGS.items() if not k.startswith("attention.")}
        dotted = {k.replace("__", "."): v for k, v in changes.items()}
        made = Trainer(parse_run_config({"task": TASK}, settings, dotted), store)
        try:
            yield made
        finally:
            made.close()

    return other()


def test_accumulated_gradients_are_the_full_batchs(tiny_store):
    """Gradients of one step, against autograd on the mean loss of the eight examples by hand."""
    gradients = {}
    for size in (None, 4, 1):
        with trainer(tiny_store, train__micro_batch_size=size, attention__dropout=0.0) as made:
            made._optimizer_step(made.batches(0))
            gradients[size] = {n: p.grad.clone() for n, p in made.model.named_parameters()}
            batch = made.batches(0)
    with trainer(tiny_store, attention__dropout=0.0) as fresh:
        loss = F.cross_entropy(fresh.model(batch.input_ids), batch.labels)
        loss.backward()
        expected = {n: p.grad for n, p in fresh.model.named_parameters()}
    for size, found in gradients.items():
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=2e-4, atol=2e-6, msg=f"{size} {name}"
            )


@pytest.mark.parametrize("size", [None, 1, 5, 36, 37, 64])
def test_evaluation_is_over_every_example(tiny_store, size):
    """Against one example at a time, dense execution, plain torch."""
    with trainer(tiny_store, train__eval_batch_size=size) as made:
        made.advance()
        found = made.evaluate("dev")
        made.model.eval()
        losses, hits = [], 0
        for ids, label in examples("dev"):
            row = torch.zeros(1, LENGTH, dtype=torch.long)
            row[0, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                logits = made.model(row)[0].double()
            losses.append((logits.logsumexp(0) - logits[label]).item())
            hits += int(logits.argmax()) == label
    assert found.num_examples == SIZES["dev"] == len(losses)
    assert found.accuracy == hits / SIZES["dev"]
    assert found.loss == pytest.approx(math.fsum(losses) / SIZES["dev"], rel=1e-5)


def test_what_a_report_says(tiny_store):
    steps = []
    with trainer(tiny_store) as made:
        made.on_step = lambda step, total: steps.append((step, total))
        report = made.advance()
        second = made.advance()
    assert steps == [(i, 8) for i in range(1, 5)]
    assert report["steps"] == 2 and second["steps"] == 4 and second["samples"] == 32
    assert all(isinstance(v, int | float) for v in report.values()), "flat numbers"
    # The rate of optimizer step 2 of 8 with a peak at step 3: halfway from peak/25 to the peak.
    assert report["learning_rate"] == pytest.approx(5e-3 / 25 + (5e-3 - 5e-3 / 25) / 2)
    assert report["parameters"] == sum(p.numel() for p in made.model.parameters())
    assert second["best_dev_accuracy"] == max(report["dev_accuracy"], second["dev_accuracy"])


def test_it_learns(tiny_store):
    with trainer(tiny_store, train__num_steps=60, train__eval_every_steps=60) as made:
        report = made.advance()
    assert report["dev_accuracy"] > 0.9 and report["train_loss"] < 0.693


def test_the_last_evaluation_is_at_the_last_step(tiny_store):
    with trainer(tiny_store, train__num_steps=7, train__eval_every_steps=3) as made:
        steps = []
        while not made.finished:
            steps.append(made.advance()["steps"])
    assert steps == [3, 6, 7]


def test_nan_stops_training(tiny_store):
    with trainer(tiny_store) as made:

        def spoil(step, total):
            if step == 3:
                made.model.head[0].weight.data[0, 0] = math.nan

        made.on_step = spoil
        made.advance()
        with pytest.raises(Diverged, match="not finite at step 4"):
            made.advance()


def test_nan_of_the_very_last_step_stops_as_well(tiny_store):
    """The training loss was still finite; an accuracy of NaN weights is not one."""
    with trainer(tiny_store) as made:

        def spoil(step, total):
            if step == 2:
                made.model.head[2].bias.data.fill_(math.nan)

        made.on_step = spoil
        with pytest.raises(Diverged):
            made.advance()
        assert made.best_accuracy == -math.inf


def test_patience(tiny_store):
    changes = {"train__patience": 2, "train__num_steps": 50, "optim__learning_rate": 1e-12}
    with trainer(tiny_store, **changes) as made:
        accuracies = []
        while not made.finished:
            accuracies.append(made.advance()["dev_accuracy"])
    # With such a rate nothing improves after the first evaluation: two stale ones, then the end.
    assert len(accuracies) == 3 and made.best_step == 2


def test_seeds(tiny_store):
    def weights(**changes):
        with trainer(tiny_store, **changes) as made:
            start = [p.detach().clone() for p in made.model.parameters()]
            report = made.advance()
            return start, made.batches(0).input_ids, report["train_loss"]

    start, batch, loss = weights()
    again = weights()
    assert same_state(start, again[0]) and torch.equal(batch, again[1]) and loss == again[2]
    other_data = weights(data__seed=7)
    assert same_state(start, other_data[0]) and not torch.equal(batch, other_data[1])
    other_model = weights(train__seed=7)
    assert not same_state(start, other_model[0]) and torch.equal(batch, other_model[1])
    assert loss not in (other_data[2], other_model[2])


def test_the_data_decide_open_sizes(tiny_store):
    with trainer(tiny_store) as made:
        sizes = made.config.model
    assert (sizes.num_classes, sizes.vocab_size, sizes.max_length) == (2, 512, 256)


def test_a_device_that_is_not_there():
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError) as caught:
            pick_device("cuda")
        assert "use auto" in one_sentence(caught.value)


# -- the runner ---------------------------------------------------------------------------------


def job(store, folder, **changes) -> Job:
    made = to_dict(config(**changes))
    return Job(run_config=made, data_folder=str(store.folder), folder=str(folder))


def run_to_end(runner: Runner):
    reports = [runner.step()]
    while not reports[-1]["done"]:
        reports.append(runner.step())
    runner.close()
    return reports


def test_runner_keeps_best_and_last_and_continues(tiny_store, tmp_path):
    whole = run_to_end(Runner(job(tiny_store, tmp_path / "whole", **RANDOM)))
    assert [r["steps"] for r in whole] == [2, 4, 6, 8]

    part = Runner(job(tiny_store, tmp_path / "part", **RANDOM))
    reports = [part.step(), part.step()]
    part.close()
    again = Runner(job(tiny_store, tmp_path / "part", **RANDOM))
    repeated = again.step()
    assert facts(repeated) == facts(reports[-1]), "the report that may have been lost comes again"
    reports += run_to_end(again)
    assert list(map(facts, reports)) == list(map(facts, whole))
    for name in ("best", "last"):
        a, b = (open_checkpoint(tmp_path / run / name) for run in ("whole", "part"))
        assert same_state(a.model_state(), b.model_state())
        assert facts(a.metrics) == facts(b.metrics) and a.config == b.config
    best = open_checkpoint(tmp_path / "whole" / "best")
    top = max(r["dev_accuracy"] for r in whole)
    assert best.metrics["dev_accuracy"] == top
    assert best.metrics["steps"] == next(r["steps"] for r in whole if r["dev_accuracy"] == top)
    assert best.metrics["data"] == f"{tiny_store.manifest.task} (tiny)"
    finished = Runner(job(tiny_store, tmp_path / "part", **RANDOM))
    assert finished.step()["done"] is True
    finished.close()


@pytest.mark.parametrize("cut_at", ["every step", "after the third"])
def test_a_run_cut_off_between_evaluations_is_the_undisturbed_one(tiny_store, tmp_path, cut_at):
    """Cut after any step and in the middle of an evaluation (37 examples are two batches)."""
    changes = {**RANDOM, "train__eval_every_steps": 4}
    whole = run_to_end(Runner(job(tiny_store, tmp_path / "whole", **changes)))

    wanted = replace(job(tiny_store, tmp_path / "part", **changes), slice_seconds=0.0)
    reports, slices, runner = [], [], Runner(wanted)
    while not (reports and reports[-1]["done"]):
        report = runner.step()
        if "under_way" not in report:
            if report["steps"] not in [r["steps"] for r in reports]:  # after a cut it comes again
                reports.append(report)
            continue
        slices.append(report["steps"])
        if cut_at == "every step" or slices == [1, 2, 3]:
            runner.close()
            torch.manual_seed(99)
            runner = Runner(wanted)
    runner.close()
    assert slices == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8], "twice at an evaluation: before and within"
    assert list(map(facts, reports)) == list(map(facts, whole))
    for name in ("best", "last"):
        a, b = (open_checkpoint(tmp_path / run / name) for run in ("whole", "part"))
        assert same_state(a.model_state(), b.model_state())
        assert same_state(a.training_state(), b.training_state())
        assert facts(a.metrics) == facts(b.metrics)


def test_a_step_that_was_broken_off_is_not_kept(tiny_store, tmp_path):
    """Its weights may be half updated; what was kept before counts."""
    wanted = replace(job(tiny_store, tmp_path, train__eval_every_steps=4), slice_seconds=0.0)
    first = Runner(wanted)
    assert first.step()["steps"] == 1
    first.close()
    second = Runner(wanted)
    assert second.step()["under_way"] is True and second.trainer.step == 2
    real = second.trainer.optimizer.step

    def broken(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    second.trainer.optimizer.step = broken
    with pytest.raises(KeyboardInterrupt):
        second.step()
    second.close()
    assert open_checkpoint(tmp_path / "last").training_state()["step"] == 1


def test_a_cut_run_of_another_process_is_left_alone(tiny_store, tmp_path, caplog):
    first = Runner(replace(job(tiny_store, tmp_path), slice_seconds=0.0))
    first.step()
    (tmp_path / CLAIM_FILE).write_text("{}")  # as another process that took it over would
    first.close()
    assert not (tmp_path / "last").exists()
    assert "the steps since the last checkpoint are lost" in caplog.text


def test_evaluate_checkpoint_is_the_reported_accuracy(tiny_store, tmp_path):
    reports = run_to_end(Runner(job(tiny_store, tmp_path)))
    last, data = str(tmp_path / "last"), str(tiny_store.folder)
    found = evaluate_checkpoint(EvaluationJob(checkpoint=last, data_folder=data, split="dev"), 1)
    assert found.accuracy == reports[-1]["dev_accuracy"] and found.num_examples == 37
    assert found.loss == pytest.approx(reports[-1]["dev_loss"], rel=1e-12)


def test_a_failure_is_a_report(tiny_store, tmp_path):
    runner = Runner(job(tiny_store, tmp_path, optim__learning_rate=1e30))
    last = run_to_end(runner)[-1]
    assert last["done"] and last["failure"].startswith("the loss is not finite at step")
    assert (tmp_path / "error.txt").read_text().rstrip().endswith("not finite at step 2")


def test_a_run_that_cannot_start_is_a_report(tiny_store, tmp_path):
    (tmp_path / "last").mkdir()
    runner = Runner(job(tiny_store, tmp_path))
    report = runner.step()
    runner.close()
    assert report["done"] and "is not a whole checkpoint" in report["failure"]


def test_a_checkpoint_of_another_run_is_refused(tiny_store, tmp_path):
    with trainer(tiny_store) as made:
        made.advance()
        made.save(tmp_path / "last")
    with trainer(tiny_store, model__num_layers=2) as other, pytest.raises(CheckpointError) as e:
        other.load(open_checkpoint(tmp_path / "last"))
    assert "does not fit the model" in one_sentence(e.value)


# -- devices that are not there ------------------------------------------------------------------


def test_auto_does_not_take_mps(monkeypatch):
    """Which nothing here is tested on; by its name it is taken."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    assert pick_device("mps").type == "mps"


class NoFloat64(TorchDispatchMode):
    """A device like MPS, on which the first tensor of float64 raises."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("execution", ["dense", "packed"])
def test_on_mps_nothing_is_summed_in_float64(tiny_store, monkeypatch, execution):
    """The whole of a step and an evaluation, with the CPU in the place of MPS."""
    assert device.sum_dtype(torch.device("cuda")) == torch.float64
    monkeypatch.setattr(passes, "sum_dtype", lambda _: device.sum_dtype(MPS))
    with trainer(tiny_store, model__execution=execution) as made, NoFloat64():
        assert 0.0 <= made.advance()["dev_accuracy"] <= 1.0


@pytest.mark.parametrize(
    ("capability", "precision", "mixed"),
    [
        ((7, 0), "auto", False),  # V100
        ((7, 5), "auto", False),  # T4
        ((8, 0), "auto", True),  # A100
        ((9, 0), "auto", True),  # H100
        ((7, 5), "bf16", True),
        ((9, 0), "fp32", False),
    ],
)
def test_auto_takes_bf16_where_it_is_computed_not_emulated(
    monkeypatch, capability, precision, mixed
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = device.autocast(torch.device("cuda"), precision)
    assert isinstance(found, torch.autocast) == mixed


@pytest.mark.parametrize(
    ("attention", "kind", "given", "expected"),
    [
        ("softmax", "cuda", None, 64),
        ("softmax", "cuda", 5, 5),
        ("softmax", "cpu", None, 32),
        ("nystrom-16", "cuda", None, 8),  # the original initialisation mixes a batch's examples
        ({"name": "nystrom", "inverse_init": "per_matrix"}, "cuda", None, 64),
    ],
)
def test_evaluation_batches_on_cuda(attention, kind, given, expected):
    settings = {k: v for k, v in SETTINGS.items() if not k.startswith("attention.")}
    made = parse_run_config(
        {"task": TASK, "attention": attention, "train.eval_batch_size": given}, settings
    ).resolved(vocab_size=512, num_classes=2)
    model = build_model(made)
    found = passes.Passes(model, model, made.train, torch.device(kind), SINGLE_PROCESS)
    assert (found.micro.size, found.evaluation.size) == (8, expected)
