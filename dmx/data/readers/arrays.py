"""Ready-made ids, <task>.{train,dev,test}.npz: a set of one's own, or the reference's splits."""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from dmx.data.prepare import Reader, Request, register
from dmx.data.sources import Source
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.format import scaled
from dmx.tasks import SPLITS, Task


def _find(task: Task, source: Source) -> str | None:
    for name in (
        f"{task.name}.train.npz",
        f"{task.name}.train.pickle",
        f"lra-{task.name}.train.pickle",
    ):
        if (root := source.locate(("",), name)) is not None:
            return root
    return None


def _describe(request: Request) -> dict[str, Any]:
    source, task = request.source, request.task
    if not source.has(f"{task.name}.train.npz"):
        raise DataError(
            f"{source.path} holds pickles of {task.name}, which dmx does not read, since a pickle "
            "can run programs; convert them, and give OUT as --source: "
            f"python scripts/convert_pickles.py {source.given} OUT"
        )
    small = task.image_side is not None or task.vocab_size <= 256
    return {
        "data_name": f"reference-{task.name}",
        "origin": "arrays of ids",
        "dtype": "uint8" if small else "uint16",
        "licence": "as the data they were made from",
    }


def read_array(stream: IO[bytes], size: int) -> npt.NDArray[Any]:
    """The array of an npy file of `size` bytes; numpy alone reserves whatever a header announces.

    Raises:
        ValueError: it announces more than it holds or than this machine has memory, or is no npy
            file of plain values.
    """
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    announced = math.prod(shape) * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if announced > min(size, memory) and not dtype.hasobject:  # which is refused anyway
        there = f"it has {scaled(size, 'B')} and this machine {scaled(memory, 'B')} of memory"
        raise ValueError(f"an array of {scaled(announced, 'B')} is announced, but {there}")
    stream.seek(0)
    return np.asarray(npy.read_array(stream, allow_pickle=False))


def _load(stream: IO[bytes], names: list[str], where: str) -> list[npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(stream) as archive:
            parts = {name: archive.getinfo(f"{name}.npy") for name in names}
            return [read_array(archive.open(part), part.file_size) for part in parts.values()]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{where} is no readable npz of arrays ({error}).") from error


def _check(ids: npt.NDArray[Any], count: int, task: Task, where: str, name: str) -> None:
    if ids.dtype.kind not in "iu" or ids.shape != (count, task.max_length):
        raise DataError(
            f"{where}: {name} is {list(ids.shape)} values of {ids.dtype} instead of "
            f"{[count, task.max_length]} integers."
        )
    # Texts are stored without padding; a black pixel is no padding.
    if task.image_side is None and not (real := ids.any(axis=1)).all():
        number = int(np.flatnonzero(~real)[0])
        raise DataError(f"{where}, example {number}, has nothing but padding in {name!r}.")


def _unpadded(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return ids[: int(np.flatnonzero(ids)[-1]) + 1]


def _fill(request: Request, writer: StoreWriter) -> None:
    """Exactly the files' examples in their order, dev and test apart."""
    task = request.task
    names = ["input_ids_0", "input_ids_1"][: 1 + task.paired]
    for split, stream, where in request.files({s: f"{task.name}.{s}.npz" for s in SPLITS}):
        if not isinstance(getattr(stream, "raw", None), io.FileIO):  # in an archive: no seeking
            stream = io.BytesIO(stream.read())
        labels, *sides = _load(stream, ["label", *names], where)
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise DataError(f"{where}: label holds no list of whole numbers.")
        for name, ids in zip(names, sides, strict=True):
            _check(ids, len(labels), task, where, name)
        if task.image_side is not None:
            writer.add_rows(split, sides[0], labels)
            continue
        for number, label in enumerate(labels.tolist()):
            first, *second = (_unpadded(ids[number]) for ids in sides)
            writer.add(split, first, label, *second)


register(
    Reader(
        name="reference-arrays",
        families=(),
        find=_find,
        expects="<task>.{train,dev,test}.npz with the arrays input_ids_0 [N, L] and label [N]",
        describe=_describe,
        fill=_fill,
        rank=1,
    )
)
