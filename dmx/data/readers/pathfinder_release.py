"""Pathfinder image folders: lra_release's pathfinder32..256 and the original generator's cl14_*."""

from __future__ import annotations

import io
import logging
import posixpath
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from dmx.data.build import write_store
from dmx.data.manifest import Manifest
from dmx.data.pathfinder_split import SPLIT_SEED, SplitPlacer
from dmx.data.png import grey_pixels
from dmx.data.progress import progress
from dmx.data.readers.base import READERS, Reader, Request
from dmx.data.sources import Source, safe_name
from dmx.data.store_writer import StoreWriter
from dmx.errors import DataError
from dmx.tasks import EMPTY_IMAGES, Task

log = logging.getLogger(__name__)
NUM_FIELDS = 11
"""subpath, file, number, label, continuity, contour length, distractor length, paddle length,
thickness, margin, number of contrasts. Some versions of the generator write more."""
_LABEL_FIELD = 3
_LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
_NPY_MAGIC = b"\x93NUMPY"
_BATCH = 1000


class ImageEntry(NamedTuple):
    """Where an image lies below the set's folder, and its label."""

    path: str
    label: int


def find(task: Task, source: Source) -> str | None:
    """The set's folder in the source, or None.

    The source may be the release, the folder of one resolution, or the set's folder itself.
    """
    if task.name.startswith("pathX-"):
        inner = task.name.removeprefix("pathX-")  # as the original generator names its folder
        tails = [f"generation/{inner}", inner]
    else:
        inner = task.name.replace("-", "/", 1)
        tails = [f"lra_release/lra_release/{inner}", f"lra_release/{inner}", inner]
    root = source.locate(tails, "metadata")
    parts = inner.split("/")
    for depth in range(1, len(parts) + 1):
        below = "/".join(parts[depth:])
        if root is None and source.path.parts[-depth:] == tuple(parts[:depth]):
            root = below if source.has(posixpath.join(below, "metadata")) else None
    return root


def parse_metadata(content: bytes, where: str) -> list[ImageEntry]:
    """The images of a metadata file: text lines (released) or a real npy of bytes (generator).

    Raises:
        DataError: a line has other columns, an unsafe path or no label, or is not UTF-8.
    """
    try:
        if content.startswith(_NPY_MAGIC):
            table = np.load(io.BytesIO(content), allow_pickle=False)
            if table.ndim != 2 or table.dtype.kind not in "SU":
                raise DataError(f"{where} holds no table of strings.")
            cells = table.astype("S").tolist()
            rows = [[cell.decode("utf-8") for cell in row] for row in cells]
        else:
            rows = [line.split() for line in content.decode("utf-8-sig").splitlines()]
            while rows and not rows[-1]:
                rows.pop()
    except (ValueError, EOFError) as error:  # a UnicodeDecodeError is a ValueError
        raise DataError(f"{where} is no readable metadata file ({error}).") from error
    entries = []
    for number, row in enumerate(rows, 1):
        at = f"{where}, line {number}"
        if len(row) < NUM_FIELDS:
            raise DataError(f"{at}: {len(row)} fields instead of {NUM_FIELDS}.")
        label = _LABELS.get(row[_LABEL_FIELD])
        if label is None:
            raise DataError(f"{at}: label {row[_LABEL_FIELD][:20]!r} is neither 0 nor 1.")
        entries.append(ImageEntry(safe_name(f"{row[0]}/{row[1]}", where), label))
    return entries


def entries(source: Source, root: str, empty: int) -> tuple[list[ImageEntry], int]:
    """All images in the order of their metadata files, and how many empty files were left out.

    Args:
        empty: image files that are empty in the published set.

    Raises:
        DataError: no metadata, or an image is missing, empty or listed twice.
    """
    folder = posixpath.join(root, "metadata")
    names = [n for n in source.files(folder) if n.endswith(".npy") and "bkp" not in n]
    if not names:
        raise DataError(f"{source.describe(folder)} has no metadata files.")
    # The reference takes the file system's order, which differs between machines.
    names.sort(key=lambda name: (*_number(name), name))
    found: dict[str, list[ImageEntry]] = {}
    for name, content in source.read_small(posixpath.join(folder, name) for name in names):
        found[name] = parse_metadata(content, source.describe(name))
    listed = [entry for name in names for entry in found[posixpath.join(folder, name)]]
    full = [e for e in listed if source.size(posixpath.join(root, e.path)) > 0]
    if len({entry.path for entry in full}) < len(full):
        raise DataError(f"{source.describe(folder)} lists an image twice.")
    if len(listed) - len(full) > empty:
        first = next(e for e in listed if source.size(posixpath.join(root, e.path)) == 0)
        raise DataError(
            f"{source.describe(root)}: {len(listed) - len(full):,} of {len(listed):,} image files "
            f"are empty, {first.path} the first, and {empty or 'none'} in the published set; the "
            "copy is broken, copy the images again."
        )
    listing = {posixpath.dirname(entry.path) for entry in listed}
    images = [posixpath.join("imgs", n) for n in source.folders(posixpath.join(root, "imgs"))]
    if lost := [name for name in images if name not in listing]:
        log.warning(
            "%s: no metadata file lists the images in %s%s; they are left out",
            *(source.describe(root), ", ".join(lost[:3])),
            f" and {len(lost) - 3} more folders" if len(lost) > 3 else "",
        )
    return full, len(listed) - len(full)


def _number(name: str) -> tuple[int, int]:
    stem = PurePosixPath(name).stem
    return (0, int(stem)) if stem.isdecimal() else (1, 0)


def fits(task: Task, source: Source | None) -> bool:
    """Whether the source has the set's folder with metadata."""
    return source is not None and find(task, source) is not None


def prepare(request: Request) -> None:
    """Write the store from the images, split as the reference splits."""
    source, task = request.source, request.task
    assert source is not None
    assert task.image_side is not None
    side = task.image_side
    root = find(task, source)
    assert root is not None

    def fill(writer: StoreWriter) -> dict[str, int]:
        images, skipped = entries(source, root, EMPTY_IMAGES.get(task.name, 0))
        if skipped:
            log.warning("%s: %d empty image file(s) left out, as in the reference", root, skipped)
        numbers = {posixpath.join(root, entry.path): n for n, entry in enumerate(images)}
        placer = SplitPlacer(writer, len(images), side * side)
        batch: list[tuple[int, np.ndarray]] = []

        def flush() -> None:
            rows = np.array([n for n, _ in batch], np.int64)
            placer.put(rows, np.stack([p for _, p in batch]), [images[n].label for n in rows])
            batch.clear()

        with progress(task.name, len(images), "images") as advance:
            for name, content in source.read_small(numbers):
                batch.append((numbers[name], grey_pixels(content, side, source.describe(name))))
                if len(batch) == _BATCH:
                    flush()
                advance(1)
            if batch:
                flush()
        return {"skipped_empty_images": skipped}

    generated = task.name.startswith("pathX-")
    manifest = Manifest.for_task(
        request.task,
        data_name="original-pathx" if generated else "lra-pathfinder",
        origin=f"{'generator output' if generated else 'LRA release'}, {source.describe(root)}",
        class_names=("apart", "connected"),
        dtype="uint8",
        parameters={"split_seed": SPLIT_SEED, "order": "metadata files by number"},
        licence="Apache 2.0 (Long Range Arena)" if not generated else "made by its generator",
    )
    write_store(request.folder, manifest, fill, replace_existing=request.force)


READERS.register("lra-pathfinder")(
    Reader(
        name="lra-pathfinder",
        families=("pathfinder",),
        fits=fits,
        expects="pathfinder<N>/curv_<level>/{imgs,metadata} or cl14_<set>/{imgs,metadata}",
        prepare=prepare,
    )
)
