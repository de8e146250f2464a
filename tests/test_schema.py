"""Strict YAML and strict dataclasses: what is refused, and that the sentence says where."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from dmx.errors import ConfigError
from dmx.schema import from_dict, parse_yaml, read_yaml, to_dict
from tests.tiny import one_sentence


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise ConfigError(f"rate is {self.rate}; it must not be above 1.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    flag: bool = False
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    where: Path = Path("x")
    inner: Inner = field(default_factory=Inner)
    table: dict[str, int] = field(default_factory=dict)


def test_round_trip_through_plain_data():
    value = Outer(
        count=3,
        flag=True,
        mode="b",
        limit=9,
        where=Path("a/b"),
        inner=Inner(rate=1e-7, names=("x", "y")),
        table={"k": 1},
    )
    plain = to_dict(value)
    assert plain["inner"] == {"rate": 1e-7, "names": ["x", "y"]} and plain["where"] == "a/b"
    assert from_dict(Outer, plain) == value


def test_plain_values_are_those_of_yaml_1_2():
    found = parse_yaml(
        "{a: [yes, No, on, off, y, true, FALSE], on: 1e-4, b: [0x10, 1_000, 0]}", "x"
    )
    assert found == {
        "a": ["yes", "No", "on", "off", "y", True, False],
        "on": 1e-4,
        "b": [16, 1000, 0],
    }
    for ambiguous in ("0100", "-012", "1:30", "1:30.5"):
        with pytest.raises(ConfigError, match=f"x: line 1: {ambiguous} is no plain decimal"):
            parse_yaml(f"a: {ambiguous}", "x")
        assert parse_yaml(f"a: '{ambiguous}'", "x") == {"a": ambiguous}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "count is required and has no value."),
        ({"count": "3"}, "count must be a whole number, not '3'."),
        ({"count": 3.0}, "count must be a whole number, not 3.0."),
        ({"count": True}, "count must be a whole number, not True."),
        ({"count": None}, "count must be a whole number, not None."),
        ({"count": 1, "flag": 1}, "flag must be true or false, not 1."),
        ({"count": 1, "flag": "yes"}, "flag must be true or false, not 'yes'."),
        ({"count": 1, "mode": "c"}, "mode is 'c'; allowed: a, b."),
        ({"count": 1, "mode": ["a"]}, "mode is ['a']; allowed: a, b."),
        ({"count": 1, "limit": "x"}, "limit must be a whole number, not 'x'."),
        ({"count": 1, "inner": {"rate": "x"}}, "inner.rate must be a number, not 'x'."),
        ({"count": 1, "inner": {"rate": True}}, "inner.rate must be a number, not True."),
        ({"count": 1, "inner": {"rate": 10**400}}, "inner.rate is too large a number."),
        ({"count": 1, "inner": {"rate": 2}}, "inner.rate is 2.0; it must not be above 1."),
        ({"count": 1, "inner": {"names": "x"}}, "inner.names must be a list, not 'x'."),
        ({"count": 1, "inner": {"names": ["x", 3]}}, "inner.names[1] must be text, not 3."),
        ({"count": 1, "inner": 5}, "inner must be a mapping, not 5."),
        ({"count": 1, "table": {"k": "v"}}, "table.k must be a whole number, not 'v'."),
        ({"count": 1, "table": [1]}, "table must be a mapping, not [1]."),
        (
            {"count": 1, "inner": {"rat": 1}},
            "inner.rat is not a setting; did you mean inner.rate? allowed: names, rate.",
        ),
        (
            {"count": 1, "zzz": 1},
            "zzz is not a setting; allowed: count, flag, inner, limit, mode, table, where.",
        ),
        ([1], "Outer must be a mapping, not [1]."),
    ],
)
def test_refused_with_the_dotted_path(data, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, data)
    assert one_sentence(caught.value) == message


def test_whole_numbers_pass_for_numbers_and_nothing_else_is_coerced():
    made = from_dict(Outer, {"count": 1, "inner": {"rate": 1}})
    assert made.inner.rate == 1.0 and isinstance(made.inner.rate, float)
    assert from_dict(Outer, {"count": 1, "limit": None}).limit is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-3e+2", -300.0),
        ("1.5e-3", 1.5e-3),
        ("1_0e1", 100.0),
        ("12", 12),
        ("0.5", 0.5),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1e-4x", "1e-4x"),
        ("'1e-4'", "1e-4"),
        ("true", True),
        ("", None),
        ("[1e-3, a]", [1e-3, "a"]),
    ],
)
def test_numbers_as_people_write_them(text, value):
    parsed = parse_yaml(text, "here")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "here: line 2: key 'a' is given twice."),
        ("b: {x: 1, x: 1}\n", "here: line 1: key 'x' is given twice."),
        ("l:\n  - {y: 1}\n  - y: 1\n    y: 2\n", "here: line 4: key 'y' is given twice."),
        ("? [1, 2]\n: 3\n", "here: line 1: a key must be a plain value."),
        ("a: [1, 2", "here line 1 is not valid YAML"),
        ("a: b: c", "here line 1 is not valid YAML"),
        ("\tx: 1", "here line 1 is not valid YAML"),
        ("a: *nobody", "here line 1 is not valid YAML"),
        ("a: &a [*a]", "is not valid YAML"),
        ("--- 1\n--- 2\n", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("!!python/name:os.getcwd", "is not valid YAML"),
        ("a: !!timestamp 2001-99-99", "is not valid YAML"),
        ("[" * 1500, "is not valid YAML"),
        ("1" * 5000, "is not valid YAML"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "here")
    assert message in one_sentence(caught.value)


def test_a_few_lines_of_aliases_do_not_stand_for_a_billion_values():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse_yaml("\n".join(lines), "here")
    assert "aliases" in one_sentence(caught.value)
    assert time.process_time() - started < 5, "it was expanded after all"
    shared = parse_yaml("x: &x {a: 1}\ny: *x\nz: {<<: *x, b: 2}\n", "here")
    assert shared == {"x": {"a": 1}, "y": {"a": 1}, "z": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"\xff\xfe\xfa", "cannot be read: it is not UTF-8 text."),
        (b"", "must hold a mapping of names to values."),
        (b"- 1\n", "must hold a mapping of names to values."),
        (b"1: a\n", "must hold a mapping of names to values."),
    ],
)
def test_files_that_are_no_mapping(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert one_sentence(caught.value) == f"{path} {message}"
    with pytest.raises(ConfigError):
        read_yaml(tmp_path)


def test_any_takes_what_it_is_given():
    @dataclass(frozen=True)
    class Holder:
        value: Any = None

    assert to_dict(Holder([1, (2, Path("p"))])) == {"value": [1, [2, "p"]]}
