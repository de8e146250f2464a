"""Hostile YAML, overrides and names: refused in one sentence, or understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dmx.config import parse_run_config
from dmx.curriculum.config import load_curriculum
from dmx.registry import find_yaml
from dmx.schema import flatten, merge, parse_assignments, read_yaml, to_dict
from dmx.search.space import load_space
from dmx.study.folder import run_folder
from tests.fuzz.guard import held, share
from tests.fuzz.hostile import VALUES, WORDS, changed
from tests.study.helpers import FIXED, SPACE_YAML
from tests.tiny import SETTINGS, TASK

RUN: dict[str, Any] = to_dict(parse_run_config({"task": TASK, "attention": "butterfly"}, SETTINGS))
SPACE = yaml.safe_load(SPACE_YAML)
SPACE["tasks"] = {"pathfinder": {"space": {"model.num_layers": {"int": [1, 2]}}}}
SMOKE = yaml.safe_load(find_yaml("smoke", "curricula").read_text(encoding="utf-8"))

RUBBISH = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join),
    st.lists(st.sampled_from([*WORDS, "a: b", "- a", "a: [*a, *a]", "&a [x]"]), max_size=8).map(
        "\n".join
    ),
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def dump(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True)


@share(0.18)
@given(st.one_of(changed(RUN).map(dump), RUBBISH))
def test_run_configs(room, text):
    file = room / "config.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with held(room):
        config = parse_run_config(read_yaml(file))
        assert parse_run_config(to_dict(config)) == config


@share(0.12)
@given(st.one_of(changed(SPACE).map(dump), RUBBISH))
def test_search_spaces(room, text):
    file = room / "space.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with held(room):
        load_space(str(file), TASK).check(TASK, FIXED)


@share(0.12)
@given(st.one_of(changed(SMOKE).map(dump), RUBBISH))
def test_curricula(room, text):
    file = room / "curriculum.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with held(room):
        load_curriculum(file)


KEYS = st.one_of(
    st.sampled_from([*flatten(RUN), "attention", "attention.name", "optim", "a.b", ".", "x..y"]),
    st.text(max_size=8),
)


@share(0.13)
@given(st.lists(st.tuples(KEYS, st.one_of(VALUES.map(repr), RUBBISH)), max_size=3))
def test_overrides(room, pairs):
    with held(room):
        overrides = parse_assignments(f"{key}={value}" for key, value in pairs)
        parse_run_config(merge(RUN, {}), overrides)


@share(0.05)
@given(st.one_of(st.sampled_from(WORDS), st.text(max_size=300), RUBBISH))
def test_names(room, name):
    with held(room):
        folder = run_folder(str(room), name, "default")
        assert folder.parent == room
