"""The file format: pathx.yaml is the published recipe, and every mistake is named by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dmx.curriculum.checks import check_transfers
from dmx.curriculum.config import CurriculumConfig, load_curriculum
from dmx.errors import ConfigError
from dmx.schema import to_dict
from tests.curriculum.fakes import curriculum
from tests.tiny import SETTINGS, TASK, one_sentence

# Issue 5's table: task, block, batch, batch per GPU, warmup, seed_data.
RECIPE = [
    ("pathfinder32-curv_contour_length_14", 32, 256, None, 312, 123),
    ("pathfinder64-curv_contour_length_9", 64, 64, None, 500, 456),
    ("pathX-cl14_nogap", 128, 64, None, 500, 789),
    ("pathX-cl14_alpha0.0", 128, 64, None, 500, 147),
    ("pathX-cl14_alpha0.75", 128, 64, None, 500, 258),
    ("pathX-cl14_alpha1.25", 128, 64, None, 500, 369),
    ("pathfinder128-curv_contour_length_14", 128, 64, None, 500, 321),
]


def pathx(**options: Any) -> CurriculumConfig:
    return load_curriculum("pathx", **options)


def test_pathx_is_the_published_recipe() -> None:
    stages = pathx().stages
    seen = [
        (
            s.task,
            s.config.attention.size,
            s.config.train.batch_size,
            s.config.train.micro_batch_size,
            s.config.optim.warmup_steps,
            s.config.data.seed,
        )
        for s in stages
    ]
    assert seen == RECIPE
    assert [s.parent for s in stages] == [None, *(s.name for s in stages[:-1])]
    for stage in stages:
        plain = to_dict(stage.config)
        assert plain["attention"]["name"] == "butterfly"
        assert plain["attention"]["dropout"] == 0.1
        model = {
            "num_layers": 4,
            "num_heads": 4,
            "head_dim": 16,
            "embedding_dim": 64,
            "hidden_dim": 128,
            "dropout": 0.0,
            "embedding_dropout": 0.1,
            "mlp_dropout": 0.1,
        }
        assert {k: plain["model"][k] for k in model} == model
        optim = {"learning_rate": 3e-4, "anneal": "cos", "weight_decay": 1e-3}
        assert {k: plain["optim"][k] for k in optim} == optim
        assert plain["train"]["num_steps"] == 25000
        assert plain["train"]["eval_every_steps"] == 312
        assert plain["train"]["seed"] == 2023
        assert stage.init_path is None and stage.reinit == ()


@pytest.mark.parametrize(
    ("attention", "field", "sizes"),
    [
        ("nystrom", "num_landmarks", [32, 64, 128, 128, 128, 128, 128]),
        ("performer-16", "num_features", [16, 32, 64, 64, 64, 64, 64]),
        ("reformer-2", "num_hashes", [2, 4, 8, 8, 8, 8, 8]),
    ],
)
def test_another_attention_takes_the_sizes(attention: str, field: str, sizes: list[int]) -> None:
    stages = pathx(attention=attention).stages
    plain = [to_dict(s.config)["attention"] for s in stages]
    assert [p["name"] for p in plain] == [attention.split("-")[0]] * 7
    assert [p[field] for p in plain] == sizes
    assert all(p["dropout"] == 0.1 and "block_size" not in p for p in plain)


def test_an_attention_without_a_size_runs_too() -> None:
    assert {s.config.attention.size for s in pathx(attention="softmax").stages} == {None}


def test_set_wins_in_every_stage() -> None:
    stages = pathx(overrides={"train.num_steps": 600, "optim.learning_rate": 0.5}).stages
    assert {s.config.train.num_steps for s in stages} == {600}
    assert {s.config.optim.learning_rate for s in stages} == {0.5}


@pytest.mark.parametrize("name", ["pathx", "pathx-mini", "smoke"])
def test_shipped_files_load(name: str) -> None:
    loaded = load_curriculum(name)
    assert loaded.name == name and len(loaded.stages) > 1


def test_chain_descendants_and_until() -> None:
    tree = curriculum(
        {"name": "a"},
        {"name": "b"},
        {"name": "left", "init_from": "b"},
        {"name": "right", "init_from": "b"},
        {"name": "alone", "init_from": "none"},
    )
    assert [s.name for s in tree.chain("left")] == ["a", "b", "left"]
    assert tree.descendants("b") == ("b", "left", "right")
    assert tree.until("left") == ("a", "b", "left")
    assert set(tree.leaves) == {"left", "right", "alone"}


def test_a_stage_may_start_from_a_later_one() -> None:
    turned = curriculum({"name": "a", "init_from": "b"}, {"name": "b", "init_from": "none"})
    assert [s.name for s in turned.stages] == ["b", "a"]


def stage(**changes: Any) -> dict[str, Any]:
    return {"name": "x", **changes}


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([stage(lerning_rate=1)], ("stages.x.lerning_rate",)),
        ([{**stage(), "optim.learning_rat": 1.0}], ("stages.x", "optim.learning_rat", "rate")),
        ([stage(optim={"learning_rate": "fast"})], ("stages.x", "optim.learning_rate", "'fast'")),
        ([stage(size=7)], ("stages.x", "block_size is 7")),
        ([stage(task="pathfinder48-cl3-d1")], ("stages.x", "pathfinder48")),
        ([stage(init_from="y")], ("stages.x.init_from", "'y' is unknown", "x")),
        ([stage(init_from="no/such.model")], ("stages.x.init_from", "no/such.model")),
        ([stage(init_from="x")], ("stages.x.init_from", "x <- x")),
        (
            [stage(init_from="y"), {"name": "y", "init_from": "x"}],
            ("init_from", "each other", "x <- y <- x"),
        ),
        ([stage(), stage()], ("stages.x", "two stages")),
        ([stage(name="a/b")], ("name is 'a/b'",)),
        ([stage(gate={"name": "threshold", "metric": "f1", "at_least": 1})], ("x.gate", "'f1'")),
        ([stage(on_fail="giveup")], ("stages.x.on_fail.action", "'giveup'", "retry")),
        ([stage(on_fail={"action": "retry", "times": 0})], ("stages.x.on_fail", "times is 0")),
        ([stage(search={"space": "nowhere"})], ("stages.x", "nowhere")),
        ([stage(search={"space": "softmax"})], ("stages.x", "softmax", "butterfly")),
        (
            [stage(search={"space": "butterfly", "scheduler": "pbt"})],
            ("stages.x", "pbt copies weights", "attention.block_size"),
        ),
        (
            [stage(search={"space": "butterfly", "sampler": "bayes"})],
            ("stages.x.search.sampler", "'bayes'", "cmaes"),
        ),
        ([stage(task="text", generate={"num_images": 5})], ("stages.x", "generat")),
        ([stage(cpus=-1)], ("stages.x", "cpus is -1")),
        ([], ("stages must be",)),
        (["x"], ("stages[0]",)),
    ],
)
def test_mistakes_are_one_sentence_with_the_path(stages: list[Any], words: tuple[str, ...]) -> None:
    shared = {"task": TASK, **SETTINGS}
    with pytest.raises(ConfigError) as error:
        load_curriculum({"defaults": shared, "stages": stages})
    text = one_sentence(error.value)
    assert all(word in text for word in words), text


def test_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("stages: [{name: x, task: pathfinder16-cl3-d1, sizes: 3}]")
    with pytest.raises(ConfigError, match=r"mine\.yaml: stages\.x\.sizes"):
        load_curriculum(path)


def test_searched_values_win_over_the_file_and_set_over_both() -> None:
    raw = {
        "defaults": {"task": TASK, **SETTINGS},
        "stages": [{"name": "x", "search": {"space": "butterfly", "num_trials": 2}}],
    }
    # The butterfly space searches blocks up to 256, the whole length here.
    free = load_curriculum(raw).stages[0]
    assert free.space is not None
    assert "optim.learning_rate" in free.space.distributions()
    assert "optim.learning_rate" not in free.overrides
    assert free.overrides["train.num_steps"] == 8
    fixed = load_curriculum(raw, overrides={"optim.learning_rate": 0.5}).stages[0]
    assert fixed.space is not None
    assert "optim.learning_rate" not in fixed.space.distributions()
    assert fixed.overrides["optim.learning_rate"] == 0.5


def test_another_condition_of_a_searched_stage_is_another_training(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"

    def training(condition: str) -> dict[str, Any]:
        file.write_text(
            "attention: butterfly\n"
            "space: {attention.block_size: {choice: [4, 8]}}\n"
            "when: [{if: {attention.block_size: 4}, then: {model.dropout: " + condition + "}}]\n",
            encoding="utf-8",
        )
        search = {"space": str(file), "num_trials": 2}
        raw = {"defaults": {"task": TASK, **SETTINGS}, "stages": [{"name": "x", "search": search}]}
        return load_curriculum(raw).stages[0].training()

    first = training("{uniform: [0.0, 0.1]}")
    assert first == training("{uniform: [0.0, 0.1]}")
    assert first != training("{uniform: [0.0, 0.9]}")
    assert first["space"]["when"] == [
        {"if": {"attention.block_size": 4}, "then": {"model.dropout": ["uniform", 0.0, 0.1]}}
    ]


def test_what_each_stage_of_pathx_takes_over() -> None:
    """32 -> 64 -> 128, then the same size; the dry run and the start of a run tell it."""
    curriculum = pathx()
    data = dict.fromkeys(s.name for s in curriculum.stages)
    told = {name: str(r) for name, r in check_transfers(curriculum, data).items()}
    first, second, *rest = (s.name for s in curriculum.stages[1:])
    assert told.pop(first).endswith("tensors, positions 32 x 32 to 64 x 64")
    assert told.pop(second).endswith("tensors, positions 64 x 64 to 128 x 128")
    assert sorted(told) == sorted(rest) and not any("position" in text for text in told.values())
