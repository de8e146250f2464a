"""settings.json: what a later session must repeat, and what it may change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmx import records as keys
from dmx.errors import ConfigError
from dmx.search.study_settings import read_settings
from dmx.study.files import open_folder

SETTINGS = {"task": "text", "seed": 0, "num_trials": 4, "grace_steps": 10}


def test_more_trials_may_be_asked_for_later(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    open_folder(folder, SETTINGS, resume=False)
    assert read_settings(folder) == SETTINGS
    open_folder(folder, {**SETTINGS, "num_trials": 9}, resume=True)
    assert read_settings(folder) == {**SETTINGS, "num_trials": 9}


@pytest.mark.parametrize(("key", "value"), [("grace_steps", 20), ("seed", 1), ("sampler", "tpe")])
def test_anything_else_is_another_study(tmp_path: Path, key: str, value: object) -> None:
    folder = tmp_path / "study"
    open_folder(folder, SETTINGS, resume=False)
    before = (folder / keys.SETTINGS_FILE).read_bytes()
    with pytest.raises(ConfigError, match=f"{key} was .*, now "):
        open_folder(folder, {**SETTINGS, key: value, "num_trials": 9}, resume=True)
    assert (folder / keys.SETTINGS_FILE).read_bytes() == before
    assert json.loads(before) == SETTINGS
