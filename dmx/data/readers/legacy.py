"""The reference's own splits, <task>.{train,dev,test}.pickle, read without running the pickles."""

from __future__ import annotations

import logging
import posixpath
from typing import Any

import numpy as np
import numpy.typing as npt

from dmx.data.build import write_store
from dmx.data.manifest import Manifest
from dmx.data.progress import bytes_text
from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.sources import Source
from dmx.data.store_writer import StoreWriter
from dmx.data.unpickle import PickledArray, load_pickle
from dmx.errors import DataError
from dmx.tasks import SPLITS, Task

log = logging.getLogger(__name__)
_LARGE_BYTES = 1_000_000_000


def _ids(example: Any, key: str, task: Task, where: str) -> npt.NDArray[Any]:
    value = example.get(key) if isinstance(example, dict) else None
    if isinstance(value, list) and all(type(n) is int and abs(n) < 1 << 63 for n in value):
        ids = np.array(value, np.int64)
    elif isinstance(value, PickledArray) and value.value.ndim == 1:
        ids = value.value
    else:
        raise DataError(f"{where} has no list of numbers {key!r}.")
    if ids.dtype.kind not in "iu" or len(ids) != task.max_length:
        raise DataError(
            f"{where} has {len(ids)} values of {ids.dtype} instead of {task.max_length} integers."
        )
    if task.image_side is None:  # texts are stored without padding; a black pixel is no padding
        if not ids.any():
            raise DataError(f"{where} has nothing but padding in {key!r}.")
        ids = ids[: int(np.flatnonzero(ids)[-1]) + 1]
    return ids


def _label(example: Any, where: str) -> int:
    value = example.get("label")
    if isinstance(value, PickledArray) and value.value.ndim == 0:
        value = value.value[()]
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise DataError(f"{where} has no whole number as its label.")
    return int(value)


def find(task: Task, source: Source) -> str | None:
    """What the pickles' names begin with, the folder and perhaps `lra-` included; or None."""
    for stem in (task.name, f"lra-{task.name}"):
        root = source.locate(("",), f"{stem}.train.pickle")
        if root is not None:
            return posixpath.join(root, stem)
    return None


def fits(task: Task, source: Source | None) -> bool:
    """Whether the source has the task's train pickle."""
    return source is not None and find(task, source) is not None


def prepare(request: Request) -> None:
    """Write the store with exactly the pickles' examples in their order, dev and test apart."""
    source, task = request.source, request.task
    assert source is not None
    stem = find(task, source)
    assert stem is not None
    names = {f"{stem}.{split}.pickle": split for split in SPLITS}

    def fill(writer: StoreWriter) -> None:
        for name, stream in source.open(names):
            where = source.describe(name)
            size = source.size(name)
            if size > _LARGE_BYTES:
                log.info("reading %s needs about %s of memory", where, bytes_text(size))
            examples = load_pickle(stream, where)
            if not isinstance(examples, list):
                raise DataError(f"{where} is no list of examples.")
            examples.reverse()
            for number in range(len(examples)):
                example = examples.pop()  # freed as it is stored
                at = f"{where}, example {number},"
                first = _ids(example, "input_ids_0", task, at)
                second = _ids(example, "input_ids_1", task, at) if task.paired else None
                writer.add(names[name], first, _label(example, at), second)

    manifest = Manifest.for_task(
        request.task,
        data_name=f"reference-{task.name}",
        origin=f"pickles of Solving-LRA-PathX / Nystromformer, {source.describe(stem)}.*.pickle",
        dtype="uint8" if task.image_side is not None or task.vocab_size <= 256 else "uint16",
        licence="as the data they were made from",
    )
    write_store(request.folder, manifest, fill, replace_existing=request.force)


READERS.register("reference-pickles")(
    Reader(
        name="reference-pickles",
        families=(),
        fits=fits,
        expects="<task>.{train,dev,test}.pickle of the reference",
        prepare=prepare,
        rank=1,
    )
)
