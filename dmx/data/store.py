"""The store of a prepared data set: its manifest, the check at its opening, and its splits.

Files: `tokens.bin` (and `tokens_1.bin` of a paired task), the ids of all examples one after another
in the order of the source; `offsets.npy` [N + 1], where each begins and ends; `labels.npy` [N];
`<split>.index.npy`, the numbers of the split's examples in the split's order; `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.errors import ConfigError, DataError
from dmx.schema import from_dict
from dmx.storage.files import MANIFEST_FILE, quick_checksum, sha256_file, write_atomic
from dmx.tasks import SPLITS, Task

log = logging.getLogger(__name__)
DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}
"""Token types of a store by their name in the manifest."""
FORMAT = 2
"""Version of the store's layout; any other is refused."""
VERIFIED_FILE = "verified.json"
"""Modification times under which a copied store passed a full check, so that it runs only once."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What the manifest says of a file."""

    bytes: int
    sha256: str
    quick: str  # a sampled checksum
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds."""

    task: str
    data_name: str  # which data, e.g. "lra-text", "generated-listops", "sample-bbc"
    origin: str  # where the data came from, in words
    is_sample: bool = False  # a stand-in that is not the published data set
    num_classes: int  # in the data; it wins over the task's own number
    class_names: tuple[str, ...] = ()  # a name per class, or empty
    max_length: int  # tokens per sequence once padded
    vocab_size: int  # ids lie in 0..vocab_size-2; vocab_size-1 is the model's CLS
    dtype: str  # "uint8" or "uint16", the stored token type (little endian)
    paired: bool = False  # each example has a second sequence
    splits: Mapping[str, int] = field(default_factory=dict)  # examples of train, dev and test
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What the preparation was told or found (seed, limits, skipped examples, ...)."""
    note: str = ""  # for the label, e.g. "generated"; empty for the usual data
    partial: str = ""
    """What sets the data apart from the task's published set, e.g. "20 of 200,000 examples"; empty
    for the whole set, for samples and for tasks that are not published. Banners, lists, reports and
    the leaderboard know it from the label."""
    licence: str = ""
    dmx_version: str = ""
    created: str = ""  # UTC, ISO 8601
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def for_task(cls, task: Task, **values: Any) -> Manifest:
        """A manifest with the task's own numbers, and `values` on top."""
        own = {
            "task": task.name,
            "num_classes": len(values.get("class_names", ())) or task.num_classes,
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
        return sum(entry.bytes for entry in self.files.values())

    @property
    def checksum(self) -> str:
        """One SHA-256 over the files' names and checksums: equal data have equal checksums."""
        lines = (f"{name} {entry.sha256}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def suffixes(self) -> list[str]:
        """What the files of the first and of the second sequences end with."""
        return ["", "_1"] if self.paired else [""]

    def class_name(self, label: int) -> str:
        """A class by number, and by name where it has one: `1 connected`."""
        name = self.class_names[label] if self.class_names else ""
        return str(label) if name in ("", str(label)) else f"{label} {name}"

    def to_json(self) -> bytes:
        """The content of manifest.json, with a checksum of itself."""
        body = {"format": FORMAT, **asdict(self)}
        body["manifest_sha256"] = _digest(body)
        return json.dumps(body, indent=1, ensure_ascii=False).encode()


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json."""
    path = folder / MANIFEST_FILE
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist, so {folder} is not a prepared data set."
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON ({error}); {_again(folder)}.") from error
    if not isinstance(body, dict):
        raise DataError(f"{path} is not a manifest (no JSON object); {_again(folder)}.")
    if (version := body.get("format")) != FORMAT:
        how = "" if body.get("is_sample") else f" (python -m dmx.data {folder.name})"
        raise DataError(
            f"{path} has store format {version!r}, but this dmx reads format {FORMAT}; "
            f"{_again(folder)}{how}."
        )
    if body.pop("manifest_sha256", None) != _digest(body):
        raise DataError(f"{path} was edited after it was written; {_again(folder)}.")
    body.pop("format")
    try:
        manifest = from_dict(Manifest, body)
        for name in manifest.files:
            if "/" in name or name in ("", "..", ".") or not name.isprintable():
                raise ConfigError(f"files: {name!r} is no name of a file beside it.")
        if set(manifest.splits) != set(SPLITS):
            raise ConfigError(f"splits: they are {', '.join(SPLITS)}.")
        if manifest.dtype not in DTYPES:
            raise ConfigError(f"dtype: allowed are {', '.join(DTYPES)}.")
    except ConfigError as error:
        raise DataError(f"{path} is wrong ({str(error).rstrip('.')}); {_again(folder)}.") from error
    return manifest


def _again(folder: Path) -> str:
    return f"delete {folder} and prepare the data again"


def open_store(folder: Path, *, verify: bool = False) -> Store:
    """Open the store in `folder` and check that it is what was written.

    Always checked: the manifest, each file's size and sampled checksum, that offsets fit tokens and
    labels. A file whose modification time is not the recorded one was copied or edited: then, once,
    its whole SHA-256 is checked. With `verify` that is done for every file, whatever its time.

    Raises:
        DataError: a file is missing, torn or edited; the sentence names it and the remedy.
    """
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    trusted = _trusted_times(folder)
    checked: dict[str, int] = {}
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            stat = path.stat()
            if stat.st_size != entry.bytes:
                raise _damaged(path, f"has {stat.st_size} bytes instead of {entry.bytes}")
            known = stat.st_mtime_ns in (entry.mtime_ns, trusted.get(name))
            whole = verify or not known
            if quick_checksum(path) != entry.quick or (whole and sha256_file(path) != entry.sha256):
                raise _damaged(path, "has another content than when it was written")
            if whole:
                checked[name] = stat.st_mtime_ns
        except FileNotFoundError as error:
            raise _damaged(path, "is missing") from error
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    if checked and not verify:
        try:
            write_atomic(folder / VERIFIED_FILE, json.dumps({**trusted, **checked}))
        except OSError as error:
            log.debug("cannot note the check in %s: %s", folder, error)
    return Store(folder, manifest)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}; it is damaged or was edited: {_again(path.parent)}.")


def _trusted_times(folder: Path) -> Mapping[str, int]:
    try:
        times = json.loads((folder / VERIFIED_FILE).read_bytes())
        return {str(name): int(time) for name, time in times.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # only a cache: without it the files are checked again


class Store:
    """A prepared data set. Pickling it sends the path, not the data; workers map the same pages."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        labels = _load(folder / "labels.npy")
        sides = [_Side(folder, suffix, manifest, len(labels)) for suffix in manifest.suffixes]
        self._splits = {name: Split(self, name, labels, sides) for name in manifest.splits}

    def split(self, name: str) -> Split:
        """The split "train", "dev" or "test"."""
        if name not in self._splits:
            raise DataError(
                f"{self.folder} has no split {name!r}; it has {', '.join(self._splits)}."
            )
        return self._splits[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.folder,)


class _Side:
    """The sequences of all examples, or the second ones of pairs."""

    def __init__(self, folder: Path, suffix: str, manifest: Manifest, count: int) -> None:
        self.offsets = _load(folder / f"offsets{suffix}.npy")
        path = folder / f"tokens{suffix}.bin"
        self.tokens: npt.NDArray[Any] = np.zeros(0, DTYPES[manifest.dtype])
        if path.stat().st_size:  # an empty file cannot be mapped
            # A plain view: the pages stay mapped, without memmap's cost per slice.
            self.tokens = np.memmap(path, self.tokens.dtype, mode="r").view(np.ndarray)
        steps = np.diff(self.offsets)
        consistent = (
            len(self.offsets) == count + 1
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.tokens)
            and (not steps.size or steps.min() >= 0)
        )
        if not consistent:
            raise DataError(f"{path} does not match its offsets; {_again(folder)}.")
        self.fixed = int(steps[0]) if steps.size and (steps == steps[0]).all() else None
        """The length of all sequences, where they have one."""


class Split:
    """One split of a store; `side` 1 is the second sequence of the examples of a paired task.

    Attributes:
        labels: int64 [N].
        lengths: int64 [N], stored tokens of the first sequence.
    """

    def __init__(
        self, store: Store, name: str, labels: npt.NDArray[np.int64], sides: list[_Side]
    ) -> None:
        self.name = name
        self.paired = store.manifest.paired
        self._folder, self._sides = store.folder, sides
        path = store.folder / f"{name}.index.npy"
        self._index = np.asarray(_load(path))
        if self._index.size and not 0 <= self._index.min() <= self._index.max() < len(labels):
            raise DataError(f"{path} names examples that are not there; {_again(store.folder)}.")
        if len(self._index) != store.manifest.splits[name]:
            raise DataError(
                f"Split {name} of {store.folder} has {len(self._index)} examples, not "
                f"{store.manifest.splits[name]}; {_again(store.folder)}."
            )
        self.labels: npt.NDArray[np.int64] = labels[self._index]
        offsets = sides[0].offsets
        self.lengths = np.asarray(offsets[self._index + 1] - offsets[self._index])

    def __len__(self) -> int:
        return len(self._index)

    def tokens(self, number: int, side: int = 0) -> npt.NDArray[Any]:
        """The ids [L] of one example, unpadded: a view of the file, no copy."""
        row, of = self._index[number], self._sides[side]
        return of.tokens[of.offsets[row] : of.offsets[row + 1]]

    def gather(self, numbers: npt.ArrayLike, length: int, side: int = 0) -> npt.NDArray[Any]:
        """Examples `numbers` [B] as [B, length], zero-padded, in the stored dtype; none is cut."""
        rows = self._index[np.asarray(numbers, dtype=np.int64)]
        tokens, offsets = self._sides[side].tokens, self._sides[side].offsets
        fixed = self._sides[side].fixed
        longest = int((offsets[rows + 1] - offsets[rows]).max(initial=0))
        if longest > length:
            raise DataError(
                f"{self._folder} has an example of {longest:,} tokens in split {self.name}, more "
                f"than the {length:,} that are read; nothing is cut."
            )
        if fixed == length:
            return np.asarray(tokens.reshape(-1, length)[rows])
        out = np.zeros((len(rows), length), tokens.dtype)
        if fixed is not None:
            out[:, :fixed] = tokens.reshape(-1, fixed)[rows]
            return out
        starts, stops = offsets[rows].tolist(), offsets[rows + 1].tolist()
        # One slice copy per row is faster than one fancy index over all tokens.
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            out[row, : stop - start] = tokens[start:stop]
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_split, (self._folder, self.name)


def _open_split(folder: Path, name: str) -> Split:
    return open_store(folder).split(name)


def _load(path: Path) -> npt.NDArray[np.int64]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        again = _again(path.parent)
        raise DataError(f"{path} is not a readable array ({error}); {again}.") from error
    if array.dtype != np.int64 or array.ndim != 1:
        raise DataError(f"{path} is not a list of int64; {_again(path.parent)}.")
    return array.view(np.ndarray)
