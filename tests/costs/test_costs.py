"""Costs: FLOPs and memory against formulas worked out by hand, ASHA's savings, hours."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dmx.attention import ATTENTIONS
from dmx.config import RunConfig, parse_run_config
from dmx.costs import measure
from dmx.costs.estimate import Cost, check_price, describe, run_cost, stage_cost, study_cost
from dmx.costs.measure import (
    GENERATED,
    RANDOM,
    Probe,
    StepCost,
    _part,
    check_memory,
    count_step,
    num_parameters,
    probe_step,
    threads,
)
from dmx.data.batches import Batch
from dmx.data.store import Store
from dmx.errors import ConfigError
from dmx.runs.study import Search
from dmx.search import simulate
from dmx.search.simulate import ExpectedSteps, expected_steps
from dmx.training.trainer import Trainer
from tests.tiny import SETTINGS, TASK, one_sentence

SIZES = {k: v for k, v in SETTINGS.items() if k != "attention.block_size"}


def _config(attention: str, **changes: object) -> RunConfig:
    values = {k.replace("__", "."): v for k, v in changes.items()}
    return parse_run_config({"task": TASK, "attention": attention}, SIZES, values)


def test_flops_without_mixing_are_the_matrix_products(tiny_store: Store) -> None:
    """q, k, v and output (16 x 16 each), MLP (16 x 16 twice): forward, and twice that backward."""
    cost = count_step(_config("none"), tiny_store, examples=4)
    per_token = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 16)
    head = 2 * (16 * 16 + 16 * 2) * 8
    assert cost.flops == pytest.approx(3 * (per_token * cost.tokens + head), rel=0.01)


@pytest.mark.parametrize("execution", ["dense", "packed"])
def test_flops_of_softmax_grow_by_the_scores(tiny_store: Store, execution: str) -> None:
    """Beyond `none`: QK^T and AV forward, four to six such products backward."""
    with_scores = count_step(_config("softmax", model__execution=execution), tiny_store, examples=2)
    without = count_step(_config("none", model__execution=execution), tiny_store, examples=2)
    lengths = tiny_store.split("train").lengths
    places = [lengths[i] for i in (16, 32)]
    pairs = 8 * 256**2 if execution == "dense" else 4 * sum(int(n) ** 2 for n in places)
    one_product = 2 * 2 * 8 * pairs  # two heads of width 8
    products = (with_scores.flops - without.flops) / one_product
    assert 5.9 < products < 8.5


@pytest.mark.parametrize("attention", ATTENTIONS.names())
def test_parameters_are_counted_without_their_memory(tiny_store: Store, attention: str) -> None:
    config = _config(attention, model__num_layers=3)
    assert num_parameters(config) == count_step(config, tiny_store).parameters


def test_a_model_that_no_memory_holds_is_refused_unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of width costs an MLP 16 -> h -> 16 33 parameters, a head 16 -> h -> 2 another 19."""
    cpu, small = torch.device("cpu"), _config("none")
    huge = _config("none", model__hidden_dim=10**10)
    assert num_parameters(huge) - num_parameters(small) == (33 + 19) * (10**10 - 16)
    with pytest.raises(ConfigError, match=r"at x: the model has 5\.2e\+11 .* 7,749 GiB") as caught:
        check_memory([("a: ", small), ("at x: ", huge)], cpu)
    one_sentence(caught.value)
    assert math.isinf(num_parameters(_config("none", model__hidden_dim=10**18)))
    with pytest.raises(ConfigError, match="fit nowhere") as caught:
        check_memory([("", _config("none", model__hidden_dim=10**19))], cpu)
    one_sentence(caught.value)
    need = 16 * num_parameters(small)
    monkeypatch.setattr(measure, "total_memory", lambda device: need)
    check_memory([("", small)], cpu)
    monkeypatch.setattr(measure, "total_memory", lambda device: need - 1)
    with pytest.raises(ConfigError, match="make the model smaller"):
        check_memory([("", small)], cpu)
    # An attention from elsewhere that needs real tensors to be built is not refused.
    monkeypatch.setattr(measure, "Classifier", lambda *a, **k: torch.ones(1).item())
    check_memory([("", small)], cpu)


def test_accumulation_changes_memory_and_not_flops(tiny_store: Store) -> None:
    whole = count_step(_config("butterfly-16"), tiny_store)
    parts = count_step(_config("butterfly-16", train__micro_batch_size=2), tiny_store)
    assert parts.flops == pytest.approx(whole.flops, rel=0.02)
    assert parts.memory_bytes < whole.memory_bytes
    state = 16 * whole.parameters
    assert (
        (parts.memory_bytes - state) * 3
        < (whole.memory_bytes - state)
        < 6 * (parts.memory_bytes - state)
    )


def test_twice_the_batch_is_twice_the_work(tiny_store: Store) -> None:
    one = count_step(_config("butterfly-16"), tiny_store)
    two = count_step(_config("butterfly-16", train__batch_size=16), tiny_store)
    assert two.flops == pytest.approx(2 * one.flops, rel=0.02)
    trainer = Trainer(_config("butterfly-16"), tiny_store)
    assert one.parameters == sum(p.numel() for p in trainer.model.parameters())
    trainer.close()


def test_counts_do_not_depend_on_the_threads(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmx.nn.cpu.LONGEST_KEPT", 1)  # longer rows have threads of their own,
    monkeypatch.setattr("dmx.nn.cpu.SCORES_AT_ONCE", 1)  # one for each group
    config = _config("softmax", attention__dropout=0.1)
    with threads(1):
        alone = count_step(config, tiny_store)
    with threads(2):
        assert count_step(config, tiny_store) == alone


def test_counting_and_probing_leave_no_trace(tiny_store: Store) -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    count_step(_config("butterfly-16"), tiny_store)
    probe = probe_step(_config("butterfly-16"), tiny_store, num_threads=1, seconds=0.2)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert probe.step_seconds > 0 and probe.eval_seconds > 0 and probe.steps >= 1
    assert probe.device == "cpu" and probe.peak_memory_bytes is None


def test_a_stage_adds_up(tiny_store: Store) -> None:
    """8 steps, 4 evaluations of a dev split of 74; memory holds weights, gradient and moments."""
    config = _config("none")
    cost, measured_on = stage_cost(config, tiny_store, 74, threads=1)
    (step,), (probe,) = cost.models, cost.probes
    assert cost.wall_seconds == 8 * probe.step_seconds + 4 * probe.eval_seconds
    assert step == count_step(config, tiny_store, examples=4)
    assert measured_on == tiny_store.manifest.label
    assert cost.memory_bytes == step.memory_bytes > 16 * step.parameters


@pytest.mark.parametrize(
    ("task", "attention", "tokens", "name"),
    [
        ("retrieval", "butterfly-64", 2 * 4096, RANDOM),
        ("listops", "linear", 2048, RANDOM),
        ("pathfinder32-curv_contour_length_14", "butterfly-32", None, GENERATED),
    ],
)
def test_a_stage_whose_data_are_not_there(
    task: str, attention: str, tokens: int | None, name: str
) -> None:
    """Full-length random tokens, or images of which 80 % and more are black; nothing is left."""
    config = parse_run_config(
        {"task": task, "attention": attention}, SIZES, {"train.batch_size": 2}
    )
    before = set(Path(tempfile.gettempdir()).glob("dmx-stand-in-*"))
    cost, measured_on = stage_cost(config, None, 10, threads=1)
    assert set(Path(tempfile.gettempdir()).glob("dmx-stand-in-*")) == before
    assert measured_on == name and cost.probes[0].steps >= 1 and cost.wall_seconds > 0
    real = cost.models[0].tokens / 2
    assert real == tokens if tokens is not None else 50 < real < 600


def test_a_large_batch_is_timed_in_part() -> None:
    """Whole micro batches where they fit, part of one where they do not."""
    cases = {(256, None, 4): (4, None), (256, 8, 20): (16, 8), (256, 8, 8): (8, None)}
    cases |= {(256, 8, 4): (4, None), (8, 4, 64): (8, 4), (8, None, 8): (8, None)}
    for (batch, micro, most), (size, part) in cases.items():
        train = _config("none", train__batch_size=batch, train__micro_batch_size=micro).train
        found = _part(train, most)
        assert (found.batch_size, found.micro_batch_size) == (size, part), (batch, micro, most)


def test_a_part_counts_for_the_whole(tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is made to last the same: a sixteenth of the batch stands for 16 times of it."""
    seen: list[int] = []

    def step(self: Trainer, batch: Batch) -> None:
        seen.append(len(batch.labels))
        time.sleep(0.01)

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr("dmx.costs.measure._CPU_POSITIONS", 2 * 256)
    probe = probe_step(_config("none", train__batch_size=32), tiny_store, seconds=0.1)
    assert set(seen) == {2}
    assert 16 * 0.01 <= probe.step_seconds < 16 * 0.05


def _expected(every: int = 1, slots: int = 1, **changes: Any) -> ExpectedSteps:
    settings = Search(
        searched={},
        scheduler="asha",
        sampler="tpe",
        seed=1,
        num_trials=9,
        max_steps=9,
        grace_steps=1,
        reduction_factor=3.0,
    )
    return expected_steps(
        dataclasses.replace(settings, **changes), eval_every_steps=every, slots=slots
    )


def test_expected_steps_at_the_ends() -> None:
    assert _expected(num_trials=1).expected == 9, "nobody to compare with"
    assert _expected(grace_steps=9).expected == 81, "no rung below the full budget"
    full = _expected(num_trials=5, max_steps=10, slots=2, scheduler="none")
    assert full.expected == full.full == 50 and full.saved == 0


def test_expected_steps_of_two_trials_by_hand() -> None:
    """The second goes on when it is no worse than the first: half of the time."""
    found = _expected(num_trials=2, max_steps=100, grace_steps=10, reduction_factor=20.0, every=10)
    assert found.expected == pytest.approx(100 + 0.5 * 100 + 0.5 * 10, abs=15)


def test_many_trials_come_near_to_successive_halving() -> None:
    """In the limit a third passes each rung: 1 + 2/3 + 6/9 steps of 9, more for early arrivals."""
    found = _expected(num_trials=600)
    limit = 600 * (1 + (3 - 1) / 3 + (9 - 3) / 9)
    assert limit < found.expected < 1.25 * limit


def test_rungs_between_evaluations_wait_for_the_next_one() -> None:
    coarse = _expected(num_trials=30, max_steps=90, grace_steps=10, every=25)
    fine = _expected(num_trials=30, max_steps=90, grace_steps=10, every=10)
    assert coarse.expected > fine.expected >= 30 * 10


def _cost(**changes: object) -> Cost:
    step = StepCost(parameters=10, tokens=5, flops=100, memory_bytes=1)
    dear = dataclasses.replace(step, flops=300)
    cheap_probe = Probe(
        step_seconds=1.0, eval_seconds=10.0, peak_memory_bytes=None, steps=3, device="cuda"
    )
    dear_probe = dataclasses.replace(cheap_probe, step_seconds=3.0, eval_seconds=20.0)
    middle = dataclasses.replace(step, flops=200)
    values: dict[str, object] = {
        "what": "study",
        "models": (step, middle, dear),
        "num_models": 3,
        "probes": (cheap_probe, dear_probe),
        "steps": ExpectedSteps(full=1000, expected=400.0),
        "num_trials": 10,
        "eval_every_steps": 10,
        "gpus_per_trial": 0.5,
        "cpus_per_trial": 2.0,
        "slots": 4,
        **changes,
    }
    return Cost(**values)  # type: ignore[arg-type]


def test_hours_by_hand() -> None:
    cost = _cost()
    assert cost.step_seconds == 2.0 and cost.eval_seconds == 15.0
    assert cost.trial_seconds == 400 * 2 + 40 * 15
    assert cost.wall_seconds == 1400 / 4
    assert cost.hours == pytest.approx(1400 * 0.5 / 3600)
    assert _cost(gpus_per_trial=0.0).hours == pytest.approx(1400 * 2 / 3600)
    final = _cost(final_steps=200)
    assert final.trial_seconds == 600 * 2 + 60 * 15
    assert _cost(num_trials=1).wall_seconds == 1400
    assert math.isnan(_cost(probes=()).trial_seconds)


def test_description_says_it_in_words() -> None:
    text = "\n".join(describe(_cost(), 3.0))
    assert "about 400 of 1 k; early stopping saves about 60 %" in text
    assert "GPU-hours: about 0.19; 0.58 at 3 each" in text
    assert describe(_cost())[-1] == "  GPU-hours: about 0.19"
    text = "\n".join(describe(_cost(probes=(), note="this machine has no GPU"), 3.0))
    assert "not estimated (this machine has no GPU)" in text and "hours" not in text


def test_run_and_study_of_real_data(tiny_store: Store) -> None:
    from dmx.search.space import Distribution, SearchSpace
    from dmx.study.study import StudyConfig

    run = run_cost(_config("butterfly-16"), tiny_store, threads=1, seconds=0.1)
    assert run.evaluations == 4 and run.steps.expected == 8 and run.wall_seconds > 0
    space = SearchSpace(
        name="x",
        attention="butterfly",
        defaults={},
        space={
            "attention.block_size": Distribution("choice", (16, 32)),
            "optim.learning_rate": Distribution("loguniform", (1e-4, 1e-2)),
        },
    )
    config = StudyConfig(
        name="s",
        task=TASK,
        space=space,
        overrides=SIZES,
        num_trials=6,
        max_steps=8,
        grace_steps=2,
    )
    many, few = (
        expected_steps(dataclasses.replace(config, num_trials=n), eval_every_steps=2, slots=4)
        for n in (10**9, simulate._MOST_TRIALS)
    )
    assert many.full == 8 * 10**9 and many.saved == pytest.approx(few.saved)
    study = study_cost(config, tiny_store, slots=2, seconds=0.1)
    assert study.num_models == 2, "learning rates cost nothing"
    assert len(study.models) == len(study.probes) == 2
    assert study.steps.full == 48 and 12 <= study.steps.expected < 48
    assert "(no GPU)" in describe(study, 1.0)[-1]


def test_no_time_is_promised_for_a_gpu_that_is_not_here(tiny_store: Store, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cost = run_cost(_config("none", train__device="cuda"), tiny_store, threads=1)
    assert not cost.probes and "no GPU" in describe(cost, 2.0)[-1]


@pytest.mark.parametrize("price", [-1.0, math.nan, math.inf])
def test_impossible_price(price: float) -> None:
    with pytest.raises(ConfigError, match="--price-per-gpu-hour"):
        check_price(price)
    with pytest.raises(ConfigError, match="add --dry-run"):
        check_price(2.0, dry_run=False)
