"""RunConfig: strict, exact after a round trip, and the reference's presets."""

from __future__ import annotations

import math

import pytest
import torch

from dmx.attention import ATTENTIONS
from dmx.cluster.capacity import Resources
from dmx.config import parse_run_config
from dmx.errors import ConfigError
from dmx.schema import flatten, parse_assignments, parse_yaml, to_dict
from dmx.study.plan import StudyOptions, fit, make_plan
from dmx.tasks import task_for, task_names
from tests.tiny import one_sentence

# lra_config.py of Solving-LRA-PathX ("training", and what "model" says of a task), read there and
# typed in here: batch, learning rate, warmup, steps, evaluation, attention dropout, vocabulary,
# longest sequence (which run_tasks.py rounds up to a power of two), classes.
REFERENCE = {
    "listops": (32, 0.0001, 1000, 5000, 50, 0.1, 32, 2000, 10),
    "image": (256, 0.0001, 175, 35000, 175, 0.1, 512, 1024, 10),
    "retrieval": (32, 0.0001, 800, 30000, 300, 0.1, 512, 4000, 2),
    "text": (32, 0.0001, 8000, 20000, 500, 0.1, 512, 4000, 2),
    "pathfinder32-curv_contour_length_14": (256, 0.0001, 312, 62400, 312, 0.1, 512, 1024, 2),
    "pathfinder64-curv_baseline": (256, 0.0001, 312, 62400, 312, 0.1, 512, 4096, 2),
    "pathfinder128-curv_contour_length_9": (256, 0.0001, 312, 62400, 312, 0.1, 512, 16384, 2),
    "pathX-cl14_alpha0.75": (256, 0.0001, 312, 62400, 312, 0.1, 512, 16384, 2),
}


@pytest.mark.parametrize("task", REFERENCE)
def test_presets_are_the_references(task):
    batch, rate, warmup, steps, every, dropout, vocabulary, longest, classes = REFERENCE[task]
    config = parse_run_config({"task": task, "attention": "softmax"})
    assert config.train.batch_size == batch
    assert config.optim.learning_rate == rate
    assert config.optim.warmup_steps == warmup
    assert config.optim.weight_decay == 0 and config.optim.anneal == "linear"
    assert config.train.num_steps == steps and config.train.eval_every_steps == every
    assert config.attention.dropout == dropout
    info = task_for(task)
    assert info.vocab_size == vocabulary and info.num_classes == classes
    assert info.max_length == 2 ** math.ceil(math.log2(longest))
    assert info.paired is (task == "retrieval")


def test_the_model_is_the_references():
    """lra_config.py's model, the same for every task; run_tasks.py sets --dropout_prob to 0."""
    model = parse_run_config({"task": "text"}).model
    assert (model.embedding_dim, model.hidden_dim) == (64, 128)
    assert (model.head_dim, model.num_heads, model.num_layers) == (32, 2, 2)
    assert model.pooling == "mean" and model.mask == "nonzero"
    assert model.dropout == model.embedding_dropout == model.mlp_dropout == 0.0


@pytest.mark.parametrize("attention", ATTENTIONS.names())
@pytest.mark.parametrize("task", ["text", "listops", "pathX-cl14_nogap"])
def test_round_trip_through_yaml(task, attention):
    config = parse_run_config(
        {"task": task, "attention": attention},
        {"optim.learning_rate": 1.23e-7, "train.patience": 3, "data.root": "/x y/ü: #"},
    )
    assert parse_run_config(parse_yaml(config.to_yaml(), "x")) == config
    assert parse_run_config(to_dict(config)) == config
    assert parse_run_config(flatten(to_dict(config))) == config


def test_round_trip_of_a_nested_attention_and_resolved_sizes():
    config = parse_run_config(
        {"task": "text", "attention": "butterfly-128", "attention.inner": "nystrom-16"}
    ).resolved(vocab_size=512, num_classes=5)
    again = parse_run_config(parse_yaml(config.to_yaml(), "x"))
    assert again == config and again.model.num_classes == 5 and again.model.max_length == 4096
    assert again.attention.inner.size == 16  # type: ignore[attr-defined]


def test_names_with_a_size():
    base = {"task": "text"}
    assert parse_run_config(base, {"attention": "butterfly-64"}).attention.size == 64
    assert parse_run_config(base, {"attention": {"name": "nystrom-32"}}).attention.size == 32
    later = parse_run_config(base, {"attention": "butterfly-64"}, {"attention.block_size": 32})
    assert later.attention.size == 32
    for wrong in ("softmax-64", "butterfly-", "butterfly-x", "butterfly--64", "-64", "butterfly-3"):
        with pytest.raises(ConfigError) as caught:
            parse_run_config(base, {"attention": wrong})
        assert one_sentence(caught.value).startswith("attention")


def test_another_attention_drops_the_sizes_below_it():
    low = {"task": "text", "attention": {"name": "butterfly", "block_size": 32, "dropout": 0.3}}
    kept = parse_run_config(low, {"attention": "butterfly"})
    assert kept.attention.size == 32
    for form in ({"attention": "nystrom"}, {"attention.name": "nystrom"}):
        replaced = parse_run_config(low, form)
        assert replaced.attention.name == "nystrom" and replaced.attention.dropout == 0.3
    assert parse_run_config(low, {"attention": "butterfly-128"}).attention.size == 128
    with pytest.raises(ConfigError, match=r"^attention\.block_size is not a setting"):
        parse_run_config({"task": "text", "attention": "nystrom", "attention.block_size": 32})


def test_overrides_win_over_layers_and_presets():
    words = ["train.batch_size=64", "optim.learning_rate=1e-3", "model.pooling=cls"]
    config = parse_run_config(
        {"task": "text", "train": {"batch_size": 8}}, parse_assignments(words)
    )
    assert config.train.batch_size == 64 and config.optim.learning_rate == 0.001
    assert config.model.pooling == "cls"
    assert config.optim.warmup_steps == 8000, "the preset lies under all"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "task is required and has no value."),
        ({"task": 3}, "task must be text, not 3."),
        ({"task": "txt"}, "task 'txt' is unknown; did you mean 'text'? choices:"),
        ({"task": "text", "foo": 1}, "foo is not a setting"),
        ({"task": "text", "model.num_layer": 1}, "model.num_layer is not a setting; did you mean"),
        ({"task": "text", "train.batch_size": "8"}, "train.batch_size must be a whole number"),
        ({"task": "text", "train.batch_size": 0}, "train.batch_size is 0"),
        ({"task": "text", "train": 5}, "train must be a mapping"),
        ({"task": "text", "model": None}, "model must be a mapping"),
        ({"task": "text", "attention": 5}, "attention must be the attention's name"),
        ({"task": "text", "attention": "fancy"}, "attention: attention 'fancy' is unknown"),
        ({"task": "text", "attention.block_size": 48}, "attention.block_size is 48"),
        ({"task": "text", "attention.block_size": 8192}, "attention.block_size is 8192"),
        ({"task": "text", "attention.dropout": 1.0}, "attention.dropout is 1.0"),
        ({"task": "text", "attention.inner": "butterfly"}, "attention.inner is butterfly"),
        ({"task": "text", "attention.inner": "linformer"}, "attention.inner: projection_dim is"),
        ({"task": "text", "optim.warmup_steps": 20000}, "optim.warmup_steps is 20000"),
        ({"task": "text", "optim.warmup_steps": 1}, "optim.warmup_steps is 1"),
        ({"task": "text", "optim.learning_rate": math.nan}, "optim.learning_rate is nan"),
        ({"task": "text", "optim.learning_rate": math.inf}, "optim.learning_rate is inf"),
        ({"task": "text", "optim.beta2": 1.0}, "optim.beta2 is 1.0"),
        ({"task": "text", "train.micro_batch_size": 5}, "train.micro_batch_size is 5"),
        ({"task": "text", "train.seed": 2**63}, "train.seed is"),
        ({"task": "text", "data.seed": -1}, "data.seed is -1"),
        ({"task": "text", "data.order": "sorted"}, "data.order is 'sorted'; allowed:"),
        ({"task": "text", "model.max_length": 2048}, "model.max_length is 2048"),
        (
            {"task": "pathfinder32-curv_baseline", "model.max_length": 4096},
            "model.max_length is 4096, but the pictures of task pathfinder32-curv_baseline have "
            "1024 pixels; leave it out",
        ),
        ({"task": "text", "model.num_layers": 10**9}, "model.num_layers is 1000000000"),
        ({"task": "text", "model.dropout": -0.1}, "model.dropout is -0.1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        parse_run_config(changes)
    text = one_sentence(caught.value)
    assert text.startswith(message), text


def test_packed_execution_of_an_attention_that_cannot(monkeypatch):
    changes = {"task": "text", "attention": "butterfly", "attention.inner": "linear"}
    assert parse_run_config({**changes, "model.execution": "packed"})
    monkeypatch.setattr("dmx.attention.linear.LinearMixer.packs", False)
    with pytest.raises(ConfigError) as caught:
        parse_run_config({**changes, "model.execution": "packed"})
    assert one_sentence(caught.value).startswith("model.execution is packed, but attention")
    assert parse_run_config({**changes, "model.execution": "auto"})


def test_a_lower_layers_mistake_is_not_hidden_by_a_higher_one():
    with pytest.raises(ConfigError, match=r"^optim is 5"):
        parse_run_config({"task": "text", "optim": 5}, {"optim.weight_decay": 0.1})


def test_checking_a_config_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    parse_run_config({"task": "text", "attention": "performer", "model.execution": "packed"})
    assert torch.equal(torch.get_rng_state(), before)


def test_data_that_need_more_than_the_model_has():
    config = parse_run_config({"task": "text", "model.num_classes": 2, "model.vocab_size": 300})
    with pytest.raises(ConfigError, match=r"model\.num_classes is 2; .* have 5"):
        config.resolved(vocab_size=257, num_classes=5)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 300; .* at least 512"):
        config.resolved(vocab_size=512, num_classes=2)
    assert all(parse_run_config({"task": name}) for name in task_names())


@pytest.mark.parametrize(
    ("steps", "warmup", "every"),
    [(100, 40, 12), (2000, 800, 250), (20000, 8000, None), (50000, 20000, None), (3, 2, 1)],
)
def test_warm_up_and_evaluations_follow_the_steps_in_train_as_in_a_search(steps, warmup, every):
    """text: 8,000 of 20,000 steps, which is 40 %; what is not given keeps that shape."""
    preset = task_for("text").preset
    every = every or preset["train.eval_every_steps"]
    made = parse_run_config({"task": "text"}, {"train.num_steps": steps})
    assert (made.optim.warmup_steps, made.train.eval_every_steps) == (warmup, every)
    options = StudyOptions(attention="linear", task="text", max_steps=steps)
    overrides = {**fit(make_plan(options, {}), Resources(2, 0)).overrides}
    searched = parse_run_config({"task": "text"}, overrides)
    assert (searched.optim.warmup_steps, searched.train.eval_every_steps) == (warmup, every)
    fixed = {"train.num_steps": steps, "train.eval_every_steps": 7}
    assert parse_run_config({"task": "text"}, fixed).train.eval_every_steps == 7
    with pytest.raises(ConfigError, match="warmup_steps is 8000"):
        parse_run_config({"task": "text", "optim.warmup_steps": 8000}, {"train.num_steps": 100})
