"""How much to train: what the user left open is chosen, what he fixed is left alone."""

from __future__ import annotations

import dataclasses

import pytest

from dmx.cluster.capacity import Resources, check_request
from dmx.errors import ConfigError
from dmx.search.space import Distribution
from dmx.study import plan
from dmx.study.plan import StudyOptions, make_plan
from dmx.study.study import StudyConfig
from dmx.tasks import Task, task_for
from tests.tiny import one_sentence

CPU, GPU = Resources(2, 0), Resources(32, 4)


def fit(task="text", resources=CPU, overrides=None, searched=(), **given) -> StudyConfig:
    """`task`: a name, or one of our own. `searched`: settings, instead of the attention's own."""
    own = {"task": task} if isinstance(task, Task) else {}
    name = "text" if own else task
    asked = StudyOptions(attention="linear", task=name, overrides=overrides or {}, **given)
    made = make_plan(asked, {})
    if searched:
        space = {name: Distribution("choice", (1,)) for name in searched}
        own["space"] = dataclasses.replace(made.space, space=space, initial_points=())
    return plan.fit(dataclasses.replace(made, **own), resources)


def test_on_gpus_the_full_budget():
    budget = fit(resources=GPU)
    assert budget.max_steps == 20000 and budget.overrides == {"train.num_steps": 20000}
    assert means(budget) == (1.0, 8.0, 1)
    shared = fit(resources=GPU, trials_per_gpu="2")
    assert means(shared) == (0.5, 4.0, 1)
    assert check_request(GPU, cpus=4.0, gpus=0.5) == 8


@pytest.mark.parametrize("task", ["text", "listops", "retrieval", "image", "pathX-cl14_nogap"])
def test_on_cpus_a_short_schedule_of_the_same_shape(task):
    budget = fit(task)
    preset = task_for(task).preset
    share = preset["optim.warmup_steps"] / preset["train.num_steps"]
    steps = budget.max_steps
    assert budget.overrides["train.num_steps"] == steps < preset["train.num_steps"]
    assert budget.overrides["train.eval_every_steps"] == steps // 8
    assert budget.overrides["optim.warmup_steps"] == max(round(share * steps), 2)
    assert budget.num_trials >= 8 and means(budget) == (0.0, 1.0, 1)
    assert budget.grace_steps >= budget.overrides["train.eval_every_steps"]
    assert str(preset["train.batch_size"]) in budget.reason, "it says what the full budget is"


def test_what_each_task_gets_on_cpus():
    found = {
        name: (fit(name).max_steps, fit(name).overrides["train.batch_size"])
        for name in ("text", "listops", "retrieval", "image", "pathX-cl14_nogap")
    }
    assert found == {
        "text": (320, 16),
        "listops": (160, 16),
        "retrieval": (80, 8),
        "image": (200, 32),
        "pathX-cl14_nogap": (200, 32),
    }


def test_a_task_of_ones_own_has_a_budget():
    """Whatever its family and preset; docs/extending.md's is searched in tests/test_extending."""
    sizes = {"max_length": 64, "vocab_size": 8, "num_classes": 2}
    bare = Task(name="mine", family="mine", **sizes)
    for resources, expected in ((CPU, (200, 32)), (GPU, (5000, None))):
        budget = fit(bare, resources)
        assert (budget.max_steps, budget.overrides.get("train.batch_size")) == expected
    assert budget.grace_steps == 5000 // 9
    small = Task(
        name="mine", family="mine", **sizes, preset={"train.batch_size": 4, "train.num_steps": 50}
    )
    budget = fit(small)
    assert (budget.max_steps, budget.overrides["train.batch_size"]) == (50, 4)


def test_what_is_fixed_or_searched_is_left_alone():
    fixed = fit(overrides={"train.batch_size": 3, "train.eval_every_steps": 7})
    assert fixed.overrides["train.batch_size"] == 3 and "batch 3 " in fixed.reason
    assert fixed.overrides["train.eval_every_steps"] == 7 and fixed.grace_steps >= 7
    searched = fit(searched={"train.batch_size", "optim.warmup_steps"})
    assert not {"train.batch_size", "optim.warmup_steps"} & set(searched.overrides)
    assert fit(overrides={"train.num_steps": 40}).max_steps == 40
    assert fit(overrides={"train.num_steps": 40}, max_steps=40).max_steps == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_trials": 0}, "--num-trials is 0"),
        ({"max_steps": -1}, "--max-steps is -1"),
        ({"trials_per_gpu": "0"}, "--trials-per-gpu is 0"),
        ({"trials_per_gpu": "2"}, "--trials-per-gpu is given, but the cluster has no GPU"),
        ({"cpus_per_trial": 0.0}, "--cpus-per-trial is 0.0; it must be positive"),
        ({"cpus_per_trial": float("nan")}, "--cpus-per-trial is nan"),
        ({"overrides": {"train.num_steps": "x"}}, "train.num_steps must be a whole number"),
        ({"overrides": {"train.num_steps": None}}, "train.num_steps must be a whole number"),
        ({"overrides": {"train.eval_every_steps": 1.5}}, "train.eval_every_steps must be a whole"),
        ({"overrides": {"train.num_steps": 5}, "max_steps": 6}, "--max-steps is 6, but"),
        ({"overrides": {"train.device": "cuda"}}, "train.device is cuda, but"),
        ({"searched": {"train.num_steps"}}, "train.num_steps cannot be searched"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        fit(**changes)
    assert one_sentence(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("request_", "slots"),
    [((1, 0), 2), ((2, 0), 1), ((0.5, 0), 4), ((1.5, 0), 1)],
)
def test_trials_at_once(request_, slots):
    assert check_request(CPU, cpus=request_[0], gpus=request_[1]) == slots


@pytest.mark.parametrize("request_", [(3, 0), (1, 1), (float("inf"), 0)])
def test_more_than_the_cluster_has(request_):
    with pytest.raises(ConfigError) as caught:
        check_request(CPU, cpus=request_[0], gpus=request_[1])
    assert "but the cluster has" in one_sentence(caught.value)


def means(config: StudyConfig) -> tuple[float, float, int]:
    """GPUs, CPU cores and processes of a trial."""
    workers = config.workers
    return workers.gpus * workers.count, workers.cpus * workers.count, workers.count


def test_gpus_and_workers_of_a_trial():
    two = fit(resources=GPU, gpus_per_trial=2)
    assert means(two) == (2.0, 16.0, 2)
    assert check_request(GPU, cpus=16.0, gpus=2.0) == 2
    assert "each by 2 workers" in two.reason
    half = fit(resources=GPU, gpus_per_trial=0.5)
    assert means(half) == (0.5, 4.0, 1)
    pair = fit(workers_per_trial=2)
    assert means(pair) == (0.0, 2.0, 2)
    assert check_request(CPU, cpus=2.0, gpus=0.0) == 1
    assert means(fit(workers_per_trial=2, cpus_per_trial=1)) == (0.0, 1.0, 2)
    assert fit().workers.count == fit(resources=GPU, trials_per_gpu="2").workers.count == 1


@pytest.mark.parametrize(
    ("resources", "changes", "message"),
    [
        (CPU, {"gpus_per_trial": 2}, "--gpus-per-trial is given, but the cluster has no GPU"),
        (GPU, {"gpus_per_trial": 0}, "--gpus-per-trial is 0"),
        (GPU, {"gpus_per_trial": 2.5}, "--gpus-per-trial is 2.5"),
        (GPU, {"gpus_per_trial": 2, "trials_per_gpu": "2"}, "contradict"),
        (GPU, {"gpus_per_trial": 2, "workers_per_trial": 4}, "has 2 GPUs"),
        (CPU, {"workers_per_trial": 0}, "--workers-per-trial is 0"),
    ],
)
def test_impossible_gpus_and_workers(resources, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        fit(resources=resources, **changes)
    one_sentence(error.value)


def test_more_gpus_than_there_are():
    with pytest.raises(ConfigError, match="asks for 8 GPUs, but the cluster has 4"):
        check_request(GPU, cpus=1, gpus=means(fit(resources=GPU, gpus_per_trial=8))[0])
