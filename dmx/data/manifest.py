"""The manifest of a prepared data set: what it holds, where it came from, and its checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmx.errors import ConfigError, DataError
from dmx.schema import from_dict
from dmx.storage.files import MANIFEST_FILE
from dmx.tasks import SPLITS, Task, find_task

DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}
"""Token types of a store by their name in the manifest."""
FORMAT = 2
"""Version of the store's layout; a reader refuses any other."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds.

    Attributes:
        task: the task's name, e.g. "text".
        data_name: which data, e.g. "lra-text", "generated-listops", "sample-bbc".
        origin: where the data came from, in words.
        is_sample: True for a stand-in that is not the published data set.
        num_classes: classes in the data; it wins over the task's own number.
        class_names: a name per class, or empty.
        max_length: tokens per sequence once padded.
        vocab_size: ids lie in 0..vocab_size-2; vocab_size-1 is the model's CLS.
        dtype: "uint8" or "uint16", the stored token type (little endian).
        paired: each example has a second sequence.
        splits: examples per split, for train, dev and test.
        parameters: what the preparation was told (seed, limits, skipped examples, ...).
        note: a short remark for the label, e.g. "generated"; empty for the usual data.
        partial: what sets the data apart from the task's published set, e.g. "20 of 200,000
            examples"; empty for the whole set, for samples and for tasks that are not published.
            Banners, lists, reports and the leaderboard know it from the label.
        licence: the licence of the data, in words.
        dmx_version: of the program that prepared it.
        created: UTC time, ISO 8601.
        files: file name -> {"bytes", "sha256", "quick" (sampled checksum), "mtime_ns"}.
    """

    task: str
    data_name: str
    origin: str
    is_sample: bool = False
    num_classes: int
    class_names: tuple[str, ...] = ()
    max_length: int
    vocab_size: int
    dtype: str
    paired: bool = False
    splits: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    partial: str = ""
    licence: str = ""
    dmx_version: str = ""
    created: str = ""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def for_task(cls, task: Task, **values: Any) -> Manifest:
        """A manifest with the task's own numbers, and `values` on top."""
        own = {
            "task": task.name,
            "num_classes": task.num_classes,
            "max_length": task.max_length,
            "vocab_size": task.vocab_size,
            "paired": task.paired,
        }
        return cls(**{**own, **values})

    @property
    def label(self) -> str:
        """How banners, result files and tables name the data: "text" or "sample-bbc, not LRA"."""
        if self.is_sample:
            return f"{self.data_name}, not LRA"
        remarks = [self.note] if self.note else []
        remarks += [f"partial: {self.partial}"] if self.partial else []
        return f"{self.task} ({', '.join(remarks)})" if remarks else self.task

    @property
    def num_bytes(self) -> int:
        """Size of all files on disk."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    @property
    def checksum(self) -> str:
        """One SHA-256 over the files' names and checksums: equal data have equal checksums."""
        lines = (f"{name} {entry['sha256']}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The content of manifest.json, with a checksum of itself."""
        body = {"format": FORMAT, **asdict(self)}
        body["manifest_sha256"] = _digest(body)
        return json.dumps(body, indent=1, ensure_ascii=False).encode()


def lacking(manifest: Manifest, classes: Mapping[str, Sequence[int]] | None = None) -> str:
    """The manifest's `partial`, worked out from its splits.

    Args:
        classes: split -> examples of each class, where the labels are known too.
    """
    task = find_task(manifest.task)
    if manifest.is_sample or task is None or task.published is None:
        return ""
    found = (task.published.lacking(manifest.splits), task.published.unbalanced(classes or {}))
    return "; ".join(part for part in found if part)


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises:
        DataError: it is missing, torn, edited, or of another format version.
    """
    path = folder / MANIFEST_FILE
    again = f"delete {folder} and prepare the data again"
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist, so {folder} is not a prepared data set."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON ({error}); {again}.") from error
    if not isinstance(body, dict):
        raise DataError(f"{path} is not a manifest (no JSON object); {again}.")
    version = body.get("format")
    if version != FORMAT:
        how = "" if body.get("is_sample") else f" (python -m dmx.data {folder.name})"
        raise DataError(
            f"{path} has store format {version!r}, but this dmx reads format {FORMAT}; "
            f"{again}{how}."
        )
    if body.pop("manifest_sha256", None) != _digest(body):
        raise DataError(f"{path} was edited after it was written; {again}.")
    body.pop("format")
    try:
        manifest = from_dict(Manifest, body)
        for name, entry in manifest.files.items():
            if "/" in name or name in ("", "..", ".") or not name.isprintable():
                raise ConfigError(f"files: {name!r} is no name of a file beside it.")
            from_dict(_Entry, entry, f"files: {name}")
        if set(manifest.splits) != set(SPLITS):
            raise ConfigError(f"splits: they are {', '.join(SPLITS)}.")
        if manifest.dtype not in DTYPES:
            raise ConfigError(f"dtype: allowed are {', '.join(DTYPES)}.")
    except ConfigError as error:
        raise DataError(f"{path} is wrong ({str(error).rstrip('.')}); {again}.") from error
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What the manifest says of a file."""

    bytes: int
    sha256: str
    quick: str
    mtime_ns: int
