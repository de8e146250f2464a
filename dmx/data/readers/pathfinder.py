"""Pathfinder: the image folders of lra_release and of the original generator, or generated.

Generated sets are made in shards, bit for bit as the original makes them.
"""

from __future__ import annotations

import io
import logging
import posixpath
import random
import shutil
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dmx.data.pathfinder import Generator, parameters_for
from dmx.data.prepare import Reader, Request, register
from dmx.data.readers.arrays import read_array
from dmx.data.shards import ShardPlan, make_shards, read_shards
from dmx.data.sources import Source, safe_name
from dmx.data.store_writer import StoreWriter
from dmx.errors import ConfigError, DataError
from dmx.format import scaled
from dmx.storage.files import explained
from dmx.tasks import EMPTY_IMAGES, NUM_IMAGES, Task
from dmx.terminal import progress

log = logging.getLogger(__name__)
CLASSES = ("apart", "connected")
SPLIT_SEED = 2222
LEAST_IMAGES = 10
SEED = 123
"""Of all published sets."""
SHARD_SIZE = 250
NUM_FIELDS = 11
"""subpath, file, number, label, continuity, contour length, distractor length, paddle length,
thickness, margin, number of contrasts. Some versions of the generator write more."""
_LABEL_FIELD = 3
_LABELS = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
_NPY_MAGIC = b"\x93NUMPY"
_SHARD_SHARE = 0.25
"""Compressed shards need at most about this share of the images' bytes."""


def pathfinder_split(count: int) -> dict[str, npt.NDArray[np.int64]]:
    """Split -> the images in it, in order.

    The reference seeds Python's generator once and shuffles one set after another, so all but the
    first of its splits depend on which sets it made before; here every set has a fresh generator.
    """
    if count < LEAST_IMAGES:
        raise DataError(f"{count} images are too few to split; at least {LEAST_IMAGES} are needed.")
    order = list(range(count))
    random.Random(SPLIT_SEED).shuffle(order)
    parts = np.split(np.array(order, np.int64), [int(count * 0.8), int(count * 0.9)])
    return dict(zip(("train", "dev", "test"), parts, strict=True))


# -- image folders ------------------------------------------------------------------------------


def _find(task: Task, source: Source) -> str | None:
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


def _parse_metadata(content: bytes, where: str) -> list[tuple[str, int]]:
    """(path, label) of the images of a metadata file: text lines (released) or a real npy of bytes
    (generator).
    """
    try:
        if content.startswith(_NPY_MAGIC):
            table = read_array(io.BytesIO(content), len(content))
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
    images = []
    for number, row in enumerate(rows, 1):
        at = f"{where}, line {number}"
        if len(row) < NUM_FIELDS:
            raise DataError(f"{at}: {len(row)} fields instead of {NUM_FIELDS}.")
        label = _LABELS.get(row[_LABEL_FIELD])
        if label is None:
            raise DataError(f"{at}: label {row[_LABEL_FIELD][:20]!r} is neither 0 nor 1.")
        images.append((safe_name(f"{row[0]}/{row[1]}", where), label))
    return images


def _images(source: Source, allowed: int) -> tuple[dict[str, int], int]:
    """Path -> label in the order of the metadata files, and how many empty images are left out.

    `allowed`: image files that are empty in the published set.
    """
    names = [n for n in source.files("metadata") if n.endswith(".npy") and "bkp" not in n]
    if not names:
        raise DataError(f"{source.describe('metadata')} has no metadata files.")
    files = source.read_small(f"metadata/{name}" for name in names)
    found = {name: _parse_metadata(content, source.describe(name)) for name, content in files}

    def by_number(name: str) -> tuple[bool, int, str]:
        stem = posixpath.basename(name).removesuffix(".npy")
        return not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem

    # The reference takes the file system's order, which differs between machines.
    listed = [image for name in sorted(found, key=by_number) for image in found[name]]
    full = [(path, label) for path, label in listed if source.size(path) > 0]
    images, empty = dict(full), len(listed) - len(full)
    if len(images) < len(full):
        raise DataError(f"{source.describe('metadata')} lists an image twice.")
    if empty > allowed:
        first = next(path for path, _ in listed if source.size(path) == 0)
        raise DataError(
            f"{source.path}: {empty:,} of {len(listed):,} image files are empty, {first} the "
            f"first, and {allowed or 'none'} in the published set; the copy is broken, copy the "
            "images again."
        )
    listing = {posixpath.dirname(path) for path, _ in listed}
    if lost := [f for f in source.folders("imgs") if f"imgs/{f}" not in listing]:
        log.warning(
            "%s: no metadata file lists the images in %s%s; they are left out",
            *(source.path, ", ".join(f"imgs/{folder}" for folder in lost[:3])),
            f" and {len(lost) - 3} more folders" if len(lost) > 3 else "",
        )
    return images, empty


def _grey_pixels(content: bytes, side: int, where: str) -> npt.NDArray[np.uint8]:
    """Pixels [side * side], rows from the top, of an 8-bit one-channel PNG."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()  # checksums up to the end mark; decoding alone overlooks a torn tail
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (side, side) or image.mode != "L":
                width, height = image.size
                raise DataError(
                    f"{where} is {width} x {height} in mode {image.mode}, not {side} x {side} grey."
                )
            return np.asarray(image, np.uint8).reshape(-1)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where} is no readable PNG: {error}.") from error


def _describe(request: Request) -> dict[str, Any]:
    generated = request.task.name.startswith("pathX-")
    return {
        "data_name": "original-pathx" if generated else "lra-pathfinder",
        "origin": "generator output" if generated else "LRA release",
        "class_names": CLASSES,
        "dtype": "uint8",
        "parameters": {"split_seed": SPLIT_SEED, "order": "metadata files by number"},
        "licence": "made by its generator" if generated else "Apache 2.0 (Long Range Arena)",
    }


def _fill(request: Request, writer: StoreWriter) -> dict[str, int]:
    """The images as they come from the source, split as the reference splits the metadata."""
    source, task = request.source, request.task
    assert task.image_side is not None
    images, skipped = _images(source, EMPTY_IMAGES.get(task.name, 0))
    if skipped:
        log.warning("%s: %d empty image file(s) left out, as in the reference", task.name, skipped)
    splits = pathfinder_split(len(images))
    places: dict[str, int] = {}
    with progress(task.name, len(images), "images") as advance:
        for name, content in source.read_small(images):
            pixels = _grey_pixels(content, task.image_side, source.describe(name))
            writer.add(None, pixels, images[name])
            places[name] = len(places)
            advance(1)
    stored = np.array([places[name] for name in images])
    for split, members in splits.items():
        writer.place(split, stored[members])
    return {"skipped_empty_images": skipped}


# -- generated ----------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _generator(dataset: str, seed: int, render: str) -> Generator:
    return Generator(dataset, seed, render=render)  # type: ignore[arg-type]


def make_shard(
    start: int, stop: int, *, dataset: str, seed: int, render: str
) -> dict[str, npt.NDArray[Any]]:
    """Images start..stop-1: "images" uint8 [N, H * W], "labels" uint8 [N]."""
    generator = _generator(dataset, seed, render)
    made = [generator.image(index) for index in range(start, stop)]
    return {
        "images": np.stack([image.reshape(-1) for image, _ in made]),
        "labels": np.array([label for _, label in made], np.uint8),
    }


def _check_room(plan: ShardPlan, pixels: int) -> None:
    """Log what disk the set needs; refuse it where there is too little room."""
    todo, size = sum(map(len, plan.missing)), plan.total * pixels
    need = size + int(_SHARD_SHARE * pixels * todo)
    with explained(plan.store.parent, "read"):
        free = shutil.disk_usage(plan.store.parent).free
    if need > free:
        raise DataError(
            f"{plan.store.name} needs {scaled(need, 'B')} in {plan.store.parent}, but only "
            f"{scaled(free, 'B')} are free; choose another --data-root or fewer --num-images."
        )
    log.info(
        "%s: generating %s images, %s on disk of the %s that are free",
        *(plan.store.name, f"{todo:,}", scaled(size, "B"), scaled(free, "B")),
    )


def _plan(request: Request) -> ShardPlan:
    options = request.options
    count = int(options.get("num_images", NUM_IMAGES))
    if count < LEAST_IMAGES:
        raise ConfigError(f"--num-images {count} is too small; the least is {LEAST_IMAGES}.")
    arguments = {
        "dataset": request.task.name,
        "seed": int(options.get("seed", SEED)),
        "render": str(options.get("render", "original")),
    }
    _generator(**arguments)  # refuses bad settings
    return ShardPlan(
        store=request.folder,
        maker=f"{__name__}:make_shard",
        arguments=arguments,
        total=count,
        size=SHARD_SIZE,
    )


def _describe_generated(request: Request) -> dict[str, Any]:
    plan, name = _plan(request), request.task.name
    seed, render = plan.arguments["seed"], plan.arguments["render"]
    # What sets the data apart from the published set of that name; pathX sets are generated.
    note = [] if name.startswith("pathX-") else ["generated"]
    if request.task.published is None and plan.total != NUM_IMAGES:  # else the label shows it
        note.append(f"{plan.total:,} images")
    note += [f"seed {seed}"] if seed != SEED else []
    note += [f"render {render}"] if render != "original" else []
    return {
        "origin": "generated by dmx, bit for bit as bhattarailab/pathfinder-generator",
        "class_names": CLASSES,
        "dtype": "uint8",
        "parameters": {
            "seed": seed,
            "render": render,
            "num_images": plan.total,
            "split_seed": SPLIT_SEED,
            "generator": asdict(parameters_for(name)),
        },
        "note": ", ".join(note),
        "licence": "none needed (generated)",
    }


def _generate(request: Request, writer: StoreWriter) -> None:
    """Make what is missing; split as the reference splits."""
    plan = _plan(request)
    _check_room(plan, request.task.max_length)
    make_shards(plan, workers=request.workers, on_cluster=request.on_cluster)
    for _, arrays in read_shards(plan):
        writer.add_rows(None, arrays["images"], arrays["labels"])
    for split, numbers in pathfinder_split(plan.total).items():
        writer.place(split, numbers)


register(
    Reader(
        name="lra-pathfinder",
        families=("pathfinder",),
        find=_find,
        expects="pathfinder<N>/curv_<level>/{imgs,metadata} or cl14_<set>/{imgs,metadata}",
        describe=_describe,
        fill=_fill,
    )
)
register(
    Reader(
        name="generated-pathfinder",
        families=("pathfinder",),
        describe=_describe_generated,
        fill=_generate,
        options=("num_images", "seed", "render"),
        rank=20,
    )
)
