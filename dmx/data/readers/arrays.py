"""Ready-made ids, <task>.{train,dev,test}.npz: a set of one's own, or the reference's splits."""

from __future__ import annotations

import io
import posixpath
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.sources import Source
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import SPLITS, Task


def _find(task: Task, source: Source) -> str | None:
    """What the files' names begin with, the folder and perhaps `lra-` included; or None."""
    for stem in (task.name, f"lra-{task.name}"):
        for ending in ("npz", "pickle"):
            root = source.locate(("",), f"{stem}.train.{ending}")
            if root is not None:
                return posixpath.join(root, stem)
    return None


def _describe(request: Request) -> dict[str, Any]:
    (source, stem), task = request.found, request.task
    if not source.has(f"{stem}.train.npz"):
        raise DataError(
            f"{source.describe(stem)}.train.pickle is a pickle, which dmx does not read, since a "
            "pickle can run programs; convert it, and give OUT as --source: "
            f"python scripts/convert_pickles.py {source.path} OUT"
        )
    small = task.image_side is not None or task.vocab_size <= 256
    return {
        "data_name": f"reference-{task.name}",
        "origin": f"arrays {source.describe(stem)}.*.npz",
        "dtype": "uint8" if small else "uint16",
        "licence": "as the data they were made from",
    }


def _load(
    stream: IO[bytes], task: Task, where: str
) -> tuple[list[npt.NDArray[Any]], npt.NDArray[Any]]:
    """([ids [N, L]] of each side, labels [N]).

    Raises:
        DataError: an array is missing, of another shape, or of no whole numbers.
    """
    try:
        content = stream if stream.seekable() else io.BytesIO(stream.read())
        with np.load(content, allow_pickle=False) as archive:
            names = ["input_ids_0", "input_ids_1"][: 1 + task.paired]
            sides, labels = [archive[name] for name in names], archive["label"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{where} is no readable npz of arrays ({error}).") from error
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{where}: label holds no list of whole numbers.")
    for name, ids in zip(names, sides, strict=True):
        if ids.dtype.kind not in "iu" or ids.shape != (len(labels), task.max_length):
            raise DataError(
                f"{where}: {name} is {list(ids.shape)} values of {ids.dtype} instead of "
                f"{[len(labels), task.max_length]} integers."
            )
        # Texts are stored without padding; a black pixel is no padding.
        if task.image_side is None and not (real := ids.any(axis=1)).all():
            number = int(np.flatnonzero(~real)[0])
            raise DataError(f"{where}, example {number}, has nothing but padding in {name!r}.")
    return sides, labels


def _unpadded(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return ids[: int(np.flatnonzero(ids)[-1]) + 1]


def _fill(request: Request, writer: StoreWriter) -> None:
    """Exactly the files' examples in their order, dev and test apart."""
    (source, stem), task = request.found, request.task
    names = {f"{stem}.{split}.npz": split for split in SPLITS}
    for name, stream in source.open(names):
        sides, labels = _load(stream, task, source.describe(name))
        if task.image_side is not None:
            writer.add_rows(names[name], sides[0], labels)
            continue
        for number, label in enumerate(labels.tolist()):
            writer.add(names[name], *_example([side[number] for side in sides], label))


def _example(sides: list[npt.NDArray[Any]], label: int) -> tuple[Any, ...]:
    first, *second = (_unpadded(ids) for ids in sides)
    return first, label, *second


READERS.register("reference-arrays")(
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
