"""ListOps from the files of lra_release: listops-1000/basic_{train,val,test}.tsv."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from dmx.data.build import write_store
from dmx.data.listops import MAX_TOKENS, VOCABULARY, values
from dmx.data.manifest import Manifest
from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.sources import Source, without_bom
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import Task

FILES = {"basic_train.tsv": "train", "basic_val.tsv": "dev", "basic_test.tsv": "test"}
FOLDERS = ("lra_release/lra_release/listops-1000", "lra_release/listops-1000", "listops-1000", "")
HEADER = ["Source", "Target"]
_IDS = {token: number for number, token in enumerate(VOCABULARY, 1)}
_IDS["]"] = _IDS["X"]
_BATCH = 1000


def parse(stream: IO[bytes], where: str) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    """(ids [L], label) per line of a ListOps tsv; columns beside Source and Target are ignored.

    Raises:
        DataError: a line lacks a column, has an unknown token or a target that is not the
            expression's value, or is not UTF-8.
    """
    lines: list[int] = []
    batch: list[tuple[npt.NDArray[np.uint8], int]] = []
    for line, ids, label in _rows(stream, where):
        lines.append(line)
        batch.append((ids, label))
        if len(batch) == _BATCH:
            _check(batch, lines, where)
            yield from batch
            lines, batch = [], []
    _check(batch, lines, where)
    yield from batch


def _check(batch: list[tuple[npt.NDArray[np.uint8], int]], lines: list[int], where: str) -> None:
    found = values([ids for ids, _ in batch])
    for line, value, (_, label) in zip(lines, found.tolist(), batch, strict=True):
        if value != label:
            what = "is no whole expression" if value < 0 else f"has the value {value}"
            raise DataError(f"{where}, line {line}: the target is {label}, but the source {what}.")


def _rows(stream: IO[bytes], where: str) -> Iterator[tuple[int, npt.NDArray[np.uint8], int]]:
    """(line, ids [L], label), not yet held against each other."""
    text = io.TextIOWrapper(without_bom(stream, where), encoding="utf-8", newline="")
    rows = csv.reader(text, delimiter="\t")
    try:
        header = next(rows, [])
        if not set(HEADER) <= set(header):
            raise DataError(
                f"{where}, line 1: expected the columns Source and Target, with a tab between them."
            )
        places = [header.index(name) for name in HEADER]
        for row in rows:
            at = f"{where}, line {rows.line_num}"
            if not row:
                continue  # an empty line, or the second half of a line end that was written twice
            if len(row) != len(header):
                raise DataError(f"{at}: {len(row)} columns instead of {len(header)}.")
            source, target = (row[place] for place in places)
            if len(target) != 1 or target not in VOCABULARY[:10]:
                raise DataError(f"{at}: target {target[:20]!r} is no digit.")
            try:
                ids = [_IDS[token] for token in source.replace("(", " ").replace(")", " ").split()]
            except KeyError as error:
                raise DataError(f"{at}: unknown token {error.args[0][:20]!r}.") from error
            if not ids:
                raise DataError(f"{at}: the source is empty.")
            if len(ids) > MAX_TOKENS:
                raise DataError(f"{at}: {len(ids):,} tokens are more than {MAX_TOKENS:,}.")
            yield rows.line_num, np.array(ids, np.uint8), int(target)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}, after line {rows.line_num}: not UTF-8 ({error.reason})."
        ) from error
    except csv.Error as error:
        raise DataError(f"{where}, line {rows.line_num}: {error}.") from error
    finally:
        text.detach()  # the source closes its own stream


def fits(task: Task, source: Source | None) -> bool:
    """Whether the source has the three files."""
    return source is not None and source.locate(FOLDERS, "basic_train.tsv") is not None


def prepare(request: Request) -> None:
    """Write the store from the tsv files."""
    source = request.source
    assert source is not None
    root = source.locate(FOLDERS, "basic_train.tsv")
    assert root is not None

    def fill(writer: StoreWriter) -> None:
        names = [posixpath.join(root, name) for name in FILES]
        for name, stream in source.open(names):
            split = FILES[posixpath.basename(name)]
            for ids, label in parse(stream, source.describe(name)):
                writer.add(split, ids, label)

    manifest = Manifest.for_task(
        request.task,
        data_name="lra-listops",
        origin=f"LRA release, {source.describe(root)}",
        class_names=tuple("0123456789"),
        dtype="uint8",
        parameters={"vocabulary": list(VOCABULARY)},
        licence="Apache 2.0 (Long Range Arena)",
    )
    write_store(request.folder, manifest, fill, replace_existing=request.force)


READERS.register("lra-listops")(
    Reader(
        name="lra-listops",
        families=("listops",),
        fits=fits,
        expects="listops-1000/basic_{train,val,test}.tsv",
        prepare=prepare,
    )
)
