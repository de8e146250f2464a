"""Paths that a user gives: `~` is written out wherever one can stand."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dmx.cli import options as cli
from dmx.cli.completion import PARSERS, parser_of
from dmx.config import parse_run_config
from dmx.curriculum.config import load_curriculum
from dmx.data.prepare import default_data_root
from dmx.errors import ConfigError
from dmx.registry import find_yaml
from dmx.schema import expand

NO_PATHS = {
    *("attention", "task", "name", "set", "settings", "objective", "address", "until"),
    *("from_stage", "trials_per_gpu", "format", "what", "reinit"),
}
"""Arguments of free text that are no path; whatever else takes text is one."""


def free_text(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments whose words are anything: no number, no switch, none of a few choices."""
    return [
        a
        for a in parser._actions
        if a.nargs != 0 and not a.choices and a.type not in (int, float) and a.dest not in NO_PATHS
    ]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("command", PARSERS)
def test_every_path_of_every_command_knows_the_home_folder(command, home):
    found = [a for a in free_text(parser_of(command)) if not is_duration(a)]
    assert found, "a command without any path?"
    for action in found:
        assert action.dest in cli.PATHS, f"{action.dest}: a path, or one of NO_PATHS?"
        value = parser_of(command)._get_value(action, "~/x/y")
        assert str(value) == f"{home}/x/y", action.dest


def is_duration(action: argparse.Action) -> bool:
    return action.type is cli.duration


@pytest.mark.parametrize("command", PARSERS)
def test_an_unknown_user_is_refused(command):
    for action in free_text(parser_of(command)):
        if is_duration(action):
            continue
        with pytest.raises(argparse.ArgumentError, match="no user 'nobody-of-that-name'"):
            parser_of(command)._get_value(action, "~nobody-of-that-name/x")


def test_only_a_tilde_in_front_is_written_out(home):
    for same in ("a/~/b", "./~x", "s3://bucket/~/x", "x~", "$HOME/x"):
        assert expand("--out", same) == same
    assert expand("--out", "~") == str(home)
    assert expand("--out", "~root/x") == "/root/x"


def test_the_data_root_of_the_environment_and_of_a_setting(home, monkeypatch):
    monkeypatch.setenv("DMX_DATA_ROOT", "~/lra")
    assert default_data_root() == home / "lra"
    monkeypatch.setenv("DMX_DATA_ROOT", "s3://bucket/lra")
    with pytest.raises(ConfigError, match="DMX_DATA_ROOT s3://bucket/lra is in object storage"):
        default_data_root()
    assert parse_run_config({"task": "text", "data.root": "~/x"}).data.root == f"{home}/x"
    with pytest.raises(ConfigError, match=r"^data\.root is '~nobody-of-that-name'"):
        parse_run_config({"task": "text", "data.root": "~nobody-of-that-name"})


def test_paths_in_yaml(home):
    (home / "spaces").mkdir(parents=True)
    space = home / "spaces" / "mine.yaml"
    space.write_text("attention: softmax\nspace: {model.num_layers: {choice: [1, 2]}}\n")
    (home / "first.model").touch()
    file = home / "c.yaml"
    file.write_text(
        "stages:\n- task: pathfinder32-curv_baseline\n  attention: softmax\n"
        "  init_from: ~/first.model\n"
        "  search: {space: ~/spaces/mine.yaml, num_trials: 2}\n"
    )
    (stage,) = load_curriculum(find_yaml("~/c.yaml", "curricula")).stages
    assert stage.init_path == str(home / "first.model")
    assert stage.space is not None and stage.space.attention == "softmax"
