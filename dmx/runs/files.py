"""What lies beside a run's journal: JSON and YAML that are checked, TensorBoard's scalars."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmx.errors import ConfigError, DataError
from dmx.runs import events, layout
from dmx.schema import read_yaml


def read_json(path: Path, hint: type) -> dict[str, Any] | None:
    """The mapping in a JSON file, held against a TypedDict; None where the file does not exist.

    Raises:
        DataError: it cannot be read, is no JSON, or a value is of another type; names it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        reason = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "no JSON"
        raise DataError(
            f"{path} is damaged ({reason}); the run's command with --resume writes it anew."
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: it must hold a mapping.")
    if wrong := events.unsound(found, hint):
        raise DataError(f"{path} is damaged: it has no sound {wrong}.")
    return found


def read_config(checkpoint: Path) -> Mapping[str, Any] | None:
    """The plain RunConfig beside a checkpoint; None where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = checkpoint / layout.CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return read_yaml(path)
    except ConfigError as error:
        raise DataError(f"{checkpoint} is damaged: {error}") from None


def read_scalars(folder: Path) -> dict[int, dict[str, float]]:
    """The scalars in a folder's own TensorBoard files, by rising step.

    A run that was resumed may have written a step twice; the later value counts.

    Raises:
        DataError: a file is damaged.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    steps: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        try:
            for raw in RawEventFileLoader(str(path)).Load():
                event = Event.FromString(raw)
                for value in event.summary.value:
                    # A tag with a slash counts by something other than optimizer steps.
                    if value.WhichOneof("value") == "simple_value" and "/" not in value.tag:
                        steps.setdefault(event.step, {})[value.tag] = value.simple_value
        except Exception as error:  # whatever a damaged file makes protobuf or TensorBoard raise
            raise DataError(f"{path} is damaged ({type(error).__name__}).") from None
    return dict(sorted(steps.items()))


def last_line(path: Path) -> str:
    """Of a traceback: the error itself."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
