"""Reading the files of a run: JSON whose shape is checked, TensorBoard scalars, Optuna's points."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmx.errors import DataError
from dmx.runs import layout
from dmx.runs.metrics import DEV_MAJORITY, NUM_DEV


@dataclass(frozen=True)
class Document:
    """A mapping from a file; a value of another type than asked for is a one-sentence error."""

    path: Path
    values: Mapping[str, Any]
    where: str = ""

    def _wrong(self, key: str, wanted: str) -> DataError:
        place = f"{self.where}.{key}" if self.where else key
        return DataError(
            f"{self.path} is damaged: {place} must be {wanted}, not {self.values[key]!r}."
        )

    def text(self, key: str, default: str = "") -> str:
        """A text."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def number(self, key: str) -> float:
        """A number; NaN where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return float(value)

    def whole(self, key: str) -> int | None:
        """A whole number or None."""
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._wrong(key, "a whole number")
        return value

    def flag(self, key: str) -> bool:
        """True or false; a missing one is false."""
        value = self.values.get(key, False)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return bool(value)

    def mapping(self, key: str) -> Document:
        """A nested mapping; an empty one where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self._wrong(key, "a mapping")
        return Document(self.path, value, f"{self.where}.{key}" if self.where else key)

    def items(self, key: str) -> list[Any]:
        """A list; an empty one where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers."""
        found = self.items(key)
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in found):
            raise self._wrong(key, "a list of numbers")
        return tuple(float(v) for v in found)

    def documents(self, key: str) -> list[Document]:
        """A list of mappings."""
        found = self.items(key)
        if any(not isinstance(v, dict) for v in found):
            raise self._wrong(key, "a list of mappings")
        place = f"{self.where}.{key}" if self.where else key
        return [Document(self.path, v, f"{place}[{i}]") for i, v in enumerate(found)]


def read_document(path: Path) -> Document | None:
    """The mapping in a JSON file; None where the file does not exist.

    Raises:
        DataError: it cannot be read, is no JSON, or holds no mapping.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        reason = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "no JSON"
        raise DataError(
            f"{path} is damaged ({reason}); the run's command with --resume writes it anew."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: it must hold a mapping.")
    return Document(path, value)


def read_dev_split(checkpoint: Path) -> dict[str, Any]:
    """What RunReport says of the dev split, from the metrics beside a checkpoint.

    Raises:
        DataError: they are damaged.
    """
    found = read_document(checkpoint / layout.METRICS_FILE) or Document(checkpoint, {})
    return {
        "num_dev": found.whole(NUM_DEV) or 0,
        "dev_majority": found.number(DEV_MAJORITY),
    }


def read_scalars(folder: Path) -> tuple[dict[str, float], ...]:
    """The scalars in a folder's own TensorBoard files, one mapping per step, by rising step.

    A run that was resumed may have written a step twice; the later value counts.
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
    return tuple(steps[step] for step in sorted(steps))


def read_points(path: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """{trial number: (Optuna's state, searched values)} of a study's Optuna storage.

    Raises:
        DataError: the storage is damaged.
    """
    if not path.is_file():
        return {}
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        frozen = [t for s in storage.get_all_studies() for t in storage.get_all_trials(s._study_id)]
    except Exception as error:  # a damaged storage raises whatever its parser meets
        raise DataError(f"{path} is damaged ({type(error).__name__}).") from None
    return {t.number: (t.state.name, dict(t.params)) for t in frozen if t.state.name != "WAITING"}
