"""What a study's folder says of the study: settings.json, read once for all who look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmx.errors import StageError
from dmx.records import SETTINGS_FILE


def read_settings(
    folder: Path, remedy: str = "start the study under a new --name"
) -> dict[str, Any]:
    """The settings of the study in a folder; {} where there is none.

    Raises:
        StageError: they are damaged; ends with the remedy.
    """
    file = folder / SETTINGS_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no mapping")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        raise StageError(f"{file} is damaged; {remedy}.") from None
    return found
