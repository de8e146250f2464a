"""`a.b=value` and dotted mappings."""

from __future__ import annotations

import pytest

from dmx.errors import ConfigError
from dmx.schema import flatten, merge, parse_assignments, set_dotted
from tests.tiny import one_sentence


def test_values_are_yaml():
    assert parse_assignments(
        ["a.b=1e-3", "c=true", "d=[1, x]", "e={f: 2}", "g='7'", "h=", "i=a=b", "j=null"]
    ) == {
        "a.b": 0.001,
        "c": True,
        "d": [1, "x"],
        "e": {"f": 2},
        "g": "7",
        "h": None,
        "i": "a=b",
        "j": None,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "override 'a' must look like a.b=value."),
        (["=1"], "override '=1' must look like a.b=value."),
        (["a..b=1"], "override 'a..b=1' must look like a.b=value."),
        ([".a=1"], "override '.a=1' must look like a.b=value."),
        (["a.=1"], "override 'a.=1' must look like a.b=value."),
        (["a=1", " a =2"], "override a is given twice."),
        (["a={}"], "override 'a={}' is an empty mapping, which sets nothing."),
        (["a=[1"], "override a line 1 is not valid YAML"),
        (["a={x: 1, x: 2}"], "override a: line 1: key 'x' is given twice."),
    ],
)
def test_malformed(words, message):
    with pytest.raises(ConfigError) as caught:
        parse_assignments(words)
    assert one_sentence(caught.value).startswith(message)


def test_flatten_and_merge_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": [2]}}, "e": None}
    flat = {"a.b": 1, "a.c.d": [2], "e": None}
    assert flatten(tree) == flat and merge(flat) == tree
    assert flatten({"a": {}}) == {}


def test_later_layers_win_and_inputs_stay():
    low, high = {"a": {"b": 1, "c": 2}}, {"a.b": 5, "d": {"e.f": 6}}
    assert merge(low, high) == {"a": {"b": 5, "c": 2}, "d": {"e": {"f": 6}}}
    assert low == {"a": {"b": 1, "c": 2}} and high == {"a.b": 5, "d": {"e.f": 6}}
    assert merge({"a.b": 1}, {"a": 3}) == {"a": 3}


def test_a_name_may_grow_settings_and_nothing_else_may():
    assert merge({"x": "butterfly"}, {"x.inner": "linear"}, {"x.inner.k": 1}) == {
        "x": {"name": "butterfly", "inner": {"name": "linear", "k": 1}}
    }
    assert merge({"x": None}, {"x.y": 1}) == {"x": {"y": 1}}
    for value in (5, [1], False, 0):
        with pytest.raises(ConfigError) as caught:
            set_dotted({"x": value}, "x.y.z", 1)
        assert one_sentence(caught.value).startswith(f"x is {value!r}, so x.y.z cannot be set")
