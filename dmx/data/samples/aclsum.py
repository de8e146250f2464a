"""sample-aclsum: pairs of ACL papers that share cited works or not, a stand-in for retrieval.

250 whole papers from the same anthology as LRA's AAN. Only 27 of them cite each other, so the label
is bibliographic coupling (Kessler 1963): 1 for two cited titles in common or more, 0 for none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from dmx.data.build import write_store
from dmx.data.bytetext import MAX_TEXT_IDS, encode
from dmx.data.manifest import Manifest
from dmx.data.samples.base import SAMPLES, Sample, digest_key, package_files
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import task_for

NAME = "sample-aclsum"
PACKAGE = "aclsum"
VERSION = "0.1.2"
PREFIX = "aclsum/dataset/paper_jsons/"
PAPERS = {"train": 150, "dev": 50, "test": 50}
LEAST_SHARED = 2
LICENCE = "ACL Anthology papers: CC BY 4.0 / CC BY-NC-SA 3.0; parses: S2ORC; package: MIT"
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
        titles = {_normalised(entry["title"] or "") for entry in parse["bib_entries"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} is no S2ORC paper ({error!r}).") from error
    cited = frozenset(title for title in titles if len(title) >= _LEAST_TITLE_LETTERS)
    return Paper(name, text.encode(), cited)


def _normalised(title: str) -> str:
    return re.sub(r"[^a-z0-9]", "", title.lower())


def pairs(papers: list[Paper]) -> list[tuple[Pair, int]]:
    """Balanced pairs among `papers` by name, with labels, in an order that mixes both.

    All positive pairs, and as many negative ones, chosen so that a paper is in about as many of
    the one as of the other: the name of a paper alone tells nothing about the label.
    """
    positive: list[Pair] = []
    negative: list[Pair] = []
    for one, other in combinations(sorted(papers, key=lambda paper: paper.name), 2):
        shared = len(one.cited & other.cited)
        if shared >= LEAST_SHARED:
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
    return digest_key(NAME, " ".join(pair).encode())


def prepare(folder: Path) -> None:
    """Write the sample's store at `folder` unless it exists; about two seconds."""
    task = task_for("retrieval")
    manifest = Manifest(
        task=task.name,
        data_name=NAME,
        origin=f"ACL papers in the PyPI package {PACKAGE} {VERSION}; shared references",
        is_sample=True,
        num_classes=2,
        class_names=("no shared references", "shared references"),
        max_length=task.max_length,
        vocab_size=task.vocab_size,
        dtype="uint16",
        paired=True,
        parameters={
            "package": f"{PACKAGE}=={VERSION}",
            "papers": PAPERS,
            "least_shared": LEAST_SHARED,
            "max_ids": MAX_TEXT_IDS,
        },
        licence=LICENCE,
    )

    def fill(writer: StoreWriter) -> None:
        paths = package_files(PACKAGE, VERSION, PREFIX, ".json")
        papers = [read_paper(path.read_bytes(), path.name) for path in paths]
        if len(papers) != sum(PAPERS.values()):
            raise DataError(
                f"{PACKAGE} has {len(papers)} papers instead of {sum(PAPERS.values())}."
            )
        papers.sort(key=lambda paper: digest_key(NAME, paper.name.encode()))
        start = 0
        for split, count in PAPERS.items():  # by paper: no text is in two splits
            part = {paper.name: paper for paper in papers[start : start + count]}
            start += count
            for (one, other), label in pairs(list(part.values())):
                writer.add(split, encode(part[one].text), label, encode(part[other].text))

    write_store(folder, manifest, fill)


SAMPLES.register(NAME)(
    Sample(
        name=NAME,
        task="retrieval",
        what="pairs of 250 ACL papers, labelled by shared references (not AAN)",
        licence=LICENCE,
        prepare=prepare,
    )
)
