"""settings.json: what a later session must repeat, and what it may change."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dmx import records as keys
from dmx.errors import ConfigError
from dmx.search.study_settings import read_settings
from dmx.study import files
from dmx.study.files import open_folder

SETTINGS = {"task": "text", "seed": 0, "num_trials": 4, "grace_steps": 10}


def test_more_trials_may_be_asked_for_later(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    open_folder(folder, SETTINGS, resume=False)
    assert read_settings(folder) == SETTINGS
    open_folder(folder, {**SETTINGS, "num_trials": 9}, resume=True)
    assert read_settings(folder) == {**SETTINGS, "num_trials": 9}


def test_no_room_for_the_new_number_of_trials_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    open_folder(folder, SETTINGS, resume=False)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_text", full)
    open_folder(folder, SETTINGS, resume=True)  # nothing to write
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        open_folder(folder, {**SETTINGS, "num_trials": 9}, resume=True)
    assert read_settings(folder) == SETTINGS


@pytest.mark.parametrize(("key", "value"), [("grace_steps", 20), ("seed", 1), ("sampler", "tpe")])
def test_anything_else_is_another_study(tmp_path: Path, key: str, value: object) -> None:
    folder = tmp_path / "study"
    open_folder(folder, SETTINGS, resume=False)
    before = (folder / keys.SETTINGS_FILE).read_bytes()
    with pytest.raises(ConfigError, match=f"{key} was .*, now "):
        open_folder(folder, {**SETTINGS, key: value, "num_trials": 9}, resume=True)
    assert (folder / keys.SETTINGS_FILE).read_bytes() == before
    assert json.loads(before) == SETTINGS
