"""Search spaces: the shipped ones, conditions, corners, and every kind of malformed YAML."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from dmx.attention import ATTENTIONS
from dmx.errors import ConfigError
from dmx.registry import find_yaml, shipped_names
from dmx.search.space import SearchSpace, load_space
from dmx.tasks import task_names
from tests.tiny import one_sentence

SHIPPED = shipped_names("search_spaces")


class Fixed:
    """A trial that yields given values, else the first option; it notes what was asked."""

    def __init__(self, **values: Any) -> None:
        self.values, self.asked = values, {}

    def _take(self, name: str, default: Any, kind: str) -> Any:
        self.asked[name] = kind
        return self.values.get(name.split(".")[-1], default)

    def suggest_categorical(self, name, choices, /):
        return self._take(name, choices[0], f"choice {list(choices)}")

    def suggest_float(self, name, low, high, *, log=False):
        return self._take(name, low, f"float {low} {high} {log}")

    def suggest_int(self, name, low, high, *, log=False):
        return self._take(name, low, f"int {low} {high} {log}")


def load(tmp_path: Path, text: str, task: str = "text") -> SearchSpace:
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return load_space(str(path), task)


def test_one_space_per_attention():
    assert ATTENTIONS.names() == SHIPPED


@pytest.mark.parametrize("task", task_names())
def test_shipped_spaces_load_and_check_for_every_task(task):
    for name in SHIPPED:
        space = load_space(name, task)
        assert space.attention == name and space.initial_points
        space.check(task, {})
        drawn = space.suggest(Fixed())
        assert set(space.initial_points[0]) == set(drawn), "the first point leaves nothing open"
        config = space.run_config(task, {"train.seed": 5}, space.initial_points[0])
        assert config.train.seed == 5 and config.attention.name == name


def test_the_papers_setting_is_tried_first_for_text():
    first = load_space("butterfly", "text").initial_points[0]
    assert first["attention.block_size"] == 256 and first["optim.learning_rate"] == 1e-4
    assert first["model.num_layers"] == 2 and first["attention.dropout"] == 0.1


GOOD = """
attention: butterfly
defaults: {model.num_layers: 2, optim: {weight_decay: 0.01}}
space:
  attention.inner: {choice: [softmax, nystrom]}
  optim.learning_rate: {loguniform: [1e-5, 3e-3]}
  train.batch_size: {logint: [4, 64]}
  model.dropout: {uniform: [0, 0.3]}
when:
  - if: {attention.inner: nystrom}
    then: {attention.inner.num_landmarks: {choice: [8, 16]}}
initial_points: [{attention.inner: nystrom, attention.inner.num_landmarks: 8}]
tasks:
  text:
    defaults: {model.num_layers: 3}
    space: {optim.learning_rate: {uniform: [0.1, 0.2]}, model.num_heads: {int: [1, 4]}}
"""


def test_kinds_conditions_and_the_tasks_part(tmp_path):
    space = load(tmp_path, GOOD.replace("{attention.inner: {choice", "{attention.inner: {choice"))
    assert space.defaults == {"model.num_layers": 3, "optim.weight_decay": 0.01}
    trial = Fixed(inner="softmax")
    point = space.suggest(trial)
    assert trial.asked == {
        "attention.inner": "choice ['softmax', 'nystrom']",
        "optim.learning_rate": "float 0.1 0.2 False",
        "train.batch_size": "int 4 64 True",
        "model.dropout": "float 0.0 0.3 False",
        "model.num_heads": "int 1 4 False",
    }
    assert "attention.inner.num_landmarks" not in point
    trial = Fixed(inner="nystrom", num_landmarks=16)
    point = space.suggest(trial)
    assert point["attention.inner.num_landmarks"] == 16
    config = space.run_config("text", {}, point)
    assert config.attention.inner.num_landmarks == 16 and config.model.num_layers == 3  # type: ignore[attr-defined]
    other = load(tmp_path, GOOD, task="listops")
    assert other.defaults["model.num_layers"] == 2 and "model.num_heads" not in other.space
    assert other.space["optim.learning_rate"].kind == "loguniform"


def test_overridden_values_are_not_searched(tmp_path):
    space = load(tmp_path, GOOD)
    fixed = space.without({"attention.inner": "softmax", "model.dropout": 0.2})
    assert set(fixed.distributions()) == {
        "optim.learning_rate",
        "train.batch_size",
        "model.num_heads",
    }
    assert fixed.initial_points == ({"attention.inner.num_landmarks": 8},)
    assert fixed.defaults["model.dropout"] == 0.2
    active = space.without({"attention.inner": "nystrom"})
    assert "attention.inner.num_landmarks" in active.distributions()
    assert "attention.inner.num_landmarks" in active.suggest(Fixed())


def reachable(space: SearchSpace) -> set[frozenset[tuple[str, Any]]]:
    """Every point `suggest` yields when each value is an option or a bound, by brute force."""
    every = {n: d.values for n, d in space.distributions().items()}
    found = set()
    for values in itertools.product(*every.values()):
        given = dict(zip(every, values, strict=True))

        class Given(Fixed):
            def _take(self, name, default, kind, given=given):
                return given[name]

        found.add(frozenset(space.suggest(Given()).items()))
    return found


def test_corners_are_what_can_be_drawn_and_nothing_else(tmp_path):
    for conditions in (
        GOOD,
        # Two conditions on one key, one that rests on the other, and one on a default.
        GOOD.replace(
            "initial_points: [",
            "  - if: {attention.inner: softmax}\n"
            "    then: {model.hidden_dim: {int: [64, 128]}}\n"
            "  - if: {model.hidden_dim: 128}\n"
            "    then: {model.head_dim: {choice: [16, 32]}, attention.dropout: {choice: [0.1]}}\n"
            "  - if: {model.num_layers: 7}\n"
            "    then: {model.embedding_dim: {choice: [1, 2, 3]}}\n"
            "initial_points: [",
        ),
    ):
        space = load(tmp_path, conditions)
        corners = [frozenset(c.items()) for c in space.corners()]
        assert set(corners) == reachable(space) and len(set(corners)) == len(corners)


def test_a_large_space_is_sampled_the_same_every_time(tmp_path):
    many = "\n".join(f"  model.x{i}: {{choice: [1, 2, 3, 4]}}" for i in range(9))
    space = load(tmp_path, f"attention: butterfly\nspace:\n{many}\n")
    corners = list(space.corners())
    assert len(corners) == 256 and corners == list(space.corners())
    assert {value for c in corners for value in c.values()} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("attention.block_size: {choice: [64, 48]}", "attention.block_size=48"),
        ("attention.block_size: {int: [64, 100]}", "attention.block_size=100"),
        ("model.num_layer: {int: [1, 2]}", "model.num_layer"),
        ("train.micro_batch_size: {choice: [5]}", "train.micro_batch_size=5"),
        ("1: {choice: [2]}", "1 is not a setting"),
        ("optim.anneal: {choice: [cos, linear, square]}", "optim.anneal=square"),
        ("model.num_layers: {choice: [1000000000]}", "model.num_layers=1000000000"),
        ("model.dropout: {choice: [0.1, '0.1']}", "model.dropout=0.1"),
        ("train.compile: {choice: [yes, no]}", "must be true or false, not 'yes'"),
        # Both bounds are powers of two, and hardly any number between them.
        ("attention.block_size: {int: [16, 256]}", "does not divide"),
    ],
)
def test_an_impossible_corner_is_named(tmp_path, line, where):
    space = load(tmp_path, f"attention: butterfly\nspace:\n  {line}\n")
    with pytest.raises(ConfigError) as caught:
        space.check("text", {})
    text = one_sentence(caught.value)
    assert text.startswith(f"search space {tmp_path / 'space.yaml'} at ") and where in text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("model.num_layers: {uniform: [1, 3]}", "uniform draws fractions; use {int: [1, 3]}"),
        ("model.num_layers: {uniform: [0.5, 3.5]}", "use {int: [1, 3]}"),
        ("train.micro_batch_size: {loguniform: [1, 8]}", "use {logint: [1, 8]}"),
    ],
)
def test_a_range_of_fractions_for_a_whole_number(tmp_path, given, wanted):
    space = load(tmp_path, f"attention: butterfly\nspace:\n  {given}\n")
    with pytest.raises(ConfigError) as caught:
        space.check("text", {})
    assert wanted in one_sentence(caught.value)


def test_what_exists_under_a_value_within_a_range_is_built_too(tmp_path):
    """Neither bound of num_layers is 2."""
    text = "attention: butterfly\nspace: {model.num_layers: {int: [1, 3]}}\nwhen:\n"
    text += "  - if: {model.num_layers: 2}\n    then: {model.num_heads: {choice: [0]}}\n"
    space = load(tmp_path, text)
    assert {c["model.num_layers"] for c in space.corners()} == {1, 2, 3}
    with pytest.raises(ConfigError, match=r"model\.num_layers=2, model\.num_heads=0: "):
        space.check("text", {})


WAYS = """
attention: butterfly
space:
  attention.block_size: {choice: [16, 32, 64]}
  optim.learning_rate: {loguniform: [1e-4, 3e-2]}
when:
  - if: {model.dropout: 0.1}
    then: {model.mlp_dropout: {uniform: [0.0, 0.2]}}
  - if: {attention.block_size: 16}
    then: {model.dropout: {choice: [0.0, 0.1]}}
  - if: {attention.block_size: 32}
    then: {model.dropout: {uniform: [0.0, 0.5]}}
  - if: {attention.block_size: 64}
    then: {model.dropout: {uniform: [0.2, 0.3]}}
initial_points:
  - {attention.block_size: 32, model.dropout: 0.4}
  - {model.dropout: 0.25}
"""


def test_a_setting_with_another_distribution_under_each_condition(tmp_path):
    """One name outside; inside one for each, since Optuna knows one distribution a name."""
    space = load(tmp_path, WAYS)
    assert space.names() == (
        *("attention.block_size", "optim.learning_rate", "model.dropout", "model.mlp_dropout"),
    )
    trial = Fixed()
    point = space.suggest(trial)
    assert point["model.dropout"] == 0.0 and "model.mlp_dropout" not in point
    assert trial.asked["model.dropout if attention.block_size=16"] == "choice [0.0, 0.1]"
    space.suggest(trial := Fixed(block_size=64))
    assert trial.asked["model.dropout if attention.block_size=64"] == "float 0.2 0.3 False"
    assert "model.dropout" not in trial.asked
    # The condition on it stands first in the file, and is met last.
    assert space.conditions[-1].key == "model.dropout"
    assert {c.get("model.mlp_dropout") for c in space.corners()} == {None, 0.0, 0.2}
    # A start point's value serves wherever it may turn out to belong.
    assert space.for_optuna({"model.dropout": 0.25, "attention.block_size": 16}) == {
        "attention.block_size": 16,
        "model.dropout if attention.block_size=32": 0.25,
        "model.dropout if attention.block_size=64": 0.25,
    }
    assert space.holds("model.dropout", 0.4) and not space.holds("model.dropout", 0.6)
    with pytest.raises(ConfigError, match=r"initial_points gives model\.dropout=0\.6"):
        load(tmp_path, WAYS.replace("0.25", "0.6"))
    # Only one of them is left: no need for another name.
    one = space.without({"attention.block_size": 32})
    assert set(one.distributions()) == {
        *("optim.learning_rate", "model.dropout", "model.mlp_dropout"),
    }


def test_an_override_can_make_a_corner_impossible(tmp_path):
    space = load(tmp_path, "attention: butterfly\nspace:\n  train.batch_size: {choice: [8, 16]}\n")
    space.check("text", {"train.micro_batch_size": 8})
    with pytest.raises(ConfigError, match=r"train\.batch_size=8"):
        space.check("text", {"train.micro_batch_size": 16})


BAD = {
    "empty": ("", "must hold a mapping"),
    "list": ("- a\n", "must hold a mapping"),
    "text": ("hello", "must hold a mapping"),
    "not-yaml": ("attention: [1, 2\n", "is not valid YAML"),
    "tabs": ("attention:\n\t- a\n", "is not valid YAML"),
    "python": ("attention: !!python/name:os.system\n", "is not valid YAML"),
    "twice": ("attention: a\nattention: b\n", "key 'attention' is given twice"),
    "no-attention": ("space: {}\n", "attention is required"),
    "attention-list": ("attention: [butterfly]\n", "attention must be text"),
    "unknown-key": (
        "attention: butterfly\nspaces: {}\n",
        "spaces is not a setting; did you mean space?",
    ),
    "space-list": ("attention: butterfly\nspace: [1]\n", "space must be a mapping, not [1]"),
    "defaults-text": ("attention: butterfly\ndefaults: x\n", "defaults must be a mapping"),
    "task-unknown": ("attention: butterfly\ntasks: {txt: {}}\n", "did you mean 'text'"),
    "task-list": ("attention: butterfly\ntasks: [text]\n", "tasks must be a mapping"),
    "task-key": (
        "attention: butterfly\ntasks: {text: {attention: x}}\n",
        "tasks.text.attention is not a setting; allowed:",
    ),
    "task-part-list": (
        "attention: butterfly\ntasks: {text: [1]}\n",
        "tasks.text must be a mapping",
    ),
    "when-in-space": (
        "attention: butterfly\nspace: {when: [{if: {}}]}\n",
        "space.when: `when` stands beside `space`, not in it",
    ),
    "when-mapping": ("attention: butterfly\nwhen: {if: 1}\n", "when must be a list"),
    "when-text": (
        "attention: butterfly\nwhen: [x]\n",
        "when[0] must be {if: {SETTING: VALUE}, then:",
    ),
    "when-keys": (
        "attention: butterfly\nwhen: [{iff: {}}]\n",
        "when[0] must be {if: {SETTING: VALUE}, then:",
    ),
    "when-no-if": ("attention: butterfly\nwhen: [{then: {}}]\n", "one setting under `if`"),
    "when-two": (
        "attention: butterfly\nspace: {a: {int: [1, 2]}}\n"
        "when: [{if: {a: 1, b: 2}, then: {c: {int: [1, 2]}}}]\n",
        "one setting under `if`",
    ),
    "when-nothing": (
        "attention: butterfly\nspace: {a: {int: [1, 2]}}\nwhen: [{if: {a: 1}}]\n",
        "when[0] must be {if: {SETTING: VALUE}, then:",
    ),
    "when-unknown": (
        "attention: butterfly\nwhen: [{if: {a: 1}, then: {c: {int: [1, 2]}}}]\n",
        "`when` asks for a, which is neither searched nor a default",
    ),
    "when-impossible": (
        "attention: butterfly\nspace: {a: {choice: [x]}}\n"
        "when: [{if: {a: y}, then: {c: {int: [1, 2]}}}]\n",
        "`when` asks for a='y', which the space cannot yield",
    ),
    "when-itself": (
        "attention: butterfly\nspace: {b: {int: [1, 2]}}\n"
        "when: [{if: {a: 1}, then: {c: {int: [1, 2]}}}, {if: {c: 1}, then: {a: {int: [1, 2]}}}]\n",
        "`when` searches a only where a has a value",
    ),
    "when-two-ways": (
        "attention: butterfly\nspace: {a: {int: [1, 2]}, b: {int: [1, 2]}}\n"
        "when: [{if: {a: 1}, then: {c: {int: [1, 2]}}}, {if: {b: 1}, then: {c: {int: [1, 3]}}}]\n",
        "c has two distributions at once, under b=1 and under a=1",
    ),
    "when-nested-two-ways": (
        "attention: butterfly\nspace: {a: {int: [1, 2]}}\n"
        "when: [{if: {a: 1}, then: {b: {int: [1, 2]}, c: {int: [1, 2]}}},\n"
        "  {if: {b: 1}, then: {c: {choice: [7]}}}]\n",
        "c has two distributions at once, under b=1 and under a=1",
    ),
    "when-besides-space": (
        "attention: butterfly\nspace: {a: {int: [1, 2]}, c: {uniform: [0, 1]}}\n"
        "when: [{if: {a: 1}, then: {c: {choice: [0.5]}}}]\n",
        "c has two distributions at once, under a=1 and under every condition",
    ),
    "start-mapping": (
        "attention: butterfly\ninitial_points: {a: 1}\n",
        "initial_points must be a list",
    ),
    "start-number": (
        "attention: butterfly\ninitial_points: [1]\n",
        "initial_points[0] must be a mapping",
    ),
    "start-unknown": (
        "attention: butterfly\nspace: {a: {int: [1, 2]}}\ninitial_points: [{b: 1}]\n",
        "initial_points gives b=1, which the space cannot yield",
    ),
    "start-outside": (
        "attention: butterfly\nspace: {a: {int: [1, 2]}}\ninitial_points: [{a: 3}]\n",
        "initial_points gives a=3",
    ),
    "start-half": (
        "attention: butterfly\nspace: {a: {int: [1, 2]}}\ninitial_points: [{a: 1.5}]\n",
        "initial_points gives a=1.5",
    ),
    "start-bool": (
        "attention: butterfly\nspace: {a: {choice: [1, 2]}}\ninitial_points: [{a: true}]\n",
        "initial_points gives a=True",
    ),
    "sets-task": (
        "attention: butterfly\ndefaults: {task: image}\n",
        "task is not to be set here",
    ),
    "searches-attention": (
        "attention: butterfly\nspace: {attention.name: {choice: [softmax]}}\n",
        "attention.name is not to be set here",
    ),
}
# Distributions, each as the value of space.a.
BAD_DISTRIBUTIONS = {
    "number": ("3", "must be one of"),
    "list": ("[1, 2]", "must be one of"),
    "unknown": ("{normal: [0, 1]}", "must be one of"),
    "two": ("{int: [1, 2], choice: [1]}", "must be one of"),
    "empty": ("{}", "must be one of"),
    "list-key": ("{[1]: 2}", "a key must be a plain value"),
    "choice-empty": ("{choice: []}", "choice must be a list of values, not []"),
    "choice-text": ("{choice: abc}", "choice must be a list of values"),
    "choice-null": ("{choice: [1, null]}", "texts, numbers and true/false only"),
    "choice-nested": ("{choice: [[1]]}", "texts, numbers and true/false only"),
    "choice-date": ("{choice: [2001-01-01]}", "texts, numbers and true/false only"),
    "choice-twice": ("{choice: [1, 2, 1]}", "holds a value twice"),
    "int-float": ("{int: [1, 2.5]}", "int must be [low, high], two whole numbers"),
    "int-one": ("{int: [1]}", "two whole numbers, not [1]"),
    "int-three": ("{int: [1, 2, 3]}", "[1, 2, 3]; for steps, list the values: {choice: [...]}"),
    "int-text": ("{int: ['1', 2]}", "['1', 2]; numbers stand without quotes"),
    "octal": ("{choice: [0100, 32]}", "0100 is no plain decimal number"),
    "int-bool": ("{int: [false, true]}", "two whole numbers"),
    "uniform-text": ("{uniform: [0, x]}", "two numbers"),
    "uniform-turned": ("{uniform: [2, 1]}", "low must be below high"),
    "uniform-same": ("{uniform: [1, 1]}", "low must be below high"),
    "uniform-inf": ("{uniform: [0, .inf]}", "low must be below high"),
    "uniform-minus-inf": ("{uniform: [-.inf, 0]}", "low must be below high"),
    "uniform-nan": ("{uniform: [.nan, 1]}", "low must be below high"),
    "int-huge": ("{int: [1, 1" + "0" * 400 + "]}", "low must be below high"),
    "loguniform-zero": ("{loguniform: [0, 1]}", "a logarithmic range must be positive"),
    "loguniform-minus": ("{loguniform: [-1, 1]}", "a logarithmic range must be positive"),
    "logint-zero": ("{logint: [0, 5]}", "a logarithmic range must be positive"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_malformed_files(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in one_sentence(caught.value)
    assert "space.yaml" in str(caught.value)


@pytest.mark.parametrize(("value", "message"), BAD_DISTRIBUTIONS.values(), ids=BAD_DISTRIBUTIONS)
@pytest.mark.parametrize("place", ["space", "tasks", "when"])
def test_malformed_distributions(tmp_path, value, message, place):
    text = {
        "space": "space: {a: %s}",
        "tasks": "tasks: {text: {space: {a: %s}}}",
        "when": "space: {b: {choice: [1]}}\nwhen: [{if: {b: 1}, then: {a: %s}}]",
    }[place]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "attention: butterfly\n" + text % value)
    assert message in one_sentence(caught.value)


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = find_yaml("butterfly", "search_spaces")
    assert by_name.is_file() and by_name.is_absolute()
    assert find_yaml("search_spaces/butterfly.yaml", "search_spaces") == by_name
    assert find_yaml("butterfly.yaml", "search_spaces") == by_name
    (tmp_path / "mine.yaml").write_text("attention: softmax\n")
    assert load_space("mine.yaml", "text").attention == "softmax"
    for wrong, part in (
        ("buterfly", "did you mean 'butterfly'?"),
        ("nothing.yaml", "nothing.yaml does not exist"),
        ("../butterfly", "is unknown"),
        ("", "is unknown"),
    ):
        with pytest.raises(ConfigError) as caught:
            find_yaml(wrong, "search_spaces")
        assert part in one_sentence(caught.value)
