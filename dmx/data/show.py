"""What is prepared, and what it looks like: strips of images, lengths and beginnings of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Column, Table

from dmx.data.prepare import SAMPLES_FOLDER
from dmx.data.readers.archives import decode as decode_text
from dmx.data.readers.listops import decode as decode_listops
from dmx.data.store import Manifest, Split, Store, open_store
from dmx.errors import ConfigError, DataError
from dmx.format import scaled
from dmx.storage.files import MANIFEST_FILE, explained
from dmx.tasks import SPLITS, task_for

_LEAST_TILE = 128
"""Small images are enlarged to at least so many pixels, by a whole factor."""
_GAP = 4
_CAPTION = 22
"""TensorBoard shrinks pictures."""
_BINS = 16
_BAR = 40
_SNIPPET = 160
_DAMAGED = "DAMAGED"


class StoreRow(NamedTuple):
    """What `python -m dmx.data list` says of one store, in words."""

    data: str
    train: str = ""
    dev: str = ""
    test: str = ""
    tokens: str = ""
    size: str = ""
    checksum: str = ""
    origin: str = ""

    @property
    def damaged(self) -> bool:
        return self.checksum == _DAMAGED


def stores(data_root: Path, *, verify: bool = False) -> list[StoreRow]:
    """What lies under `data_root`: tasks, then samples, then generated sets that are unfinished.

    Args:
        verify: check every file's whole SHA-256.
    """
    rows = []
    for pattern in (f"*/{MANIFEST_FILE}", f"{SAMPLES_FOLDER}/*/{MANIFEST_FILE}"):
        for path in sorted(data_root.glob(pattern)):
            try:
                rows.append(_row(open_store(path.parent, verify=verify).manifest))
            except DataError as error:
                rows.append(StoreRow(path.parent.name, checksum=_DAMAGED, origin=str(error)))
    for folder in sorted(data_root.glob(".*.shards-*")):
        task = folder.name[1:].rpartition(".shards-")[0]
        shards = len(list(folder.glob("[0-9]*.npz")))
        found = f"{shards} shards; run it again"
        rows.append(StoreRow(task, checksum="unfinished", origin=found))
    return rows


def _row(manifest: Manifest) -> StoreRow:
    train, dev, test = (f"{manifest.splits[split]:,}" for split in SPLITS)
    index = [manifest.files[f"{split}.index.npy"].sha256 for split in SPLITS]
    return StoreRow(
        data=manifest.label,
        train=train,
        dev="= test" if index[1] == index[2] else dev,
        test=test,
        tokens=str(manifest.max_length),
        size=scaled(manifest.num_bytes, "B"),
        checksum=manifest.checksum[:12],
        origin=manifest.origin,
    )


def strip(store: Store, split_name: str, count: int) -> Image.Image:
    """The first `count` images of a split side by side, each with its label below.

    Raises:
        ConfigError: there are fewer.
    """
    split = store.split(split_name)
    _check_count(count, split)
    names = [store.manifest.class_name(int(label)) for label in split.labels[:count]]
    captions = [(name, "black") for name in names]
    return pictures(store, split_name, range(count), captions).convert("L")


def pictures(
    store: Store,
    split_name: str,
    numbers: Sequence[int],
    captions: Sequence[tuple[str, str]],
    columns: int | None = None,
) -> Image.Image:
    """Images `numbers` of a split; below each its caption, a text and its colour.

    A pixel with id 0 is a masked token, and black. `columns`: images side by side; None: all.
    """
    side = task_for(store.manifest.task).image_side
    assert side is not None
    pixels = store.split(split_name).gather(list(numbers), side * side).astype(np.uint8)
    tile = side * max(1, -(-_LEAST_TILE // side))
    columns = min(columns or len(numbers), len(numbers))
    width, height = columns * (tile + _GAP) + _GAP, tile + 2 * _GAP + _CAPTION
    font = ImageFont.load_default(_CAPTION - 4)
    picture = Image.new("RGB", (width, height * -(-len(numbers) // columns)), "white")
    draw = ImageDraw.Draw(picture)
    for place, (row, (text, colour)) in enumerate(zip(pixels, captions, strict=True)):
        image = Image.fromarray(row.reshape(side, side)).convert("RGB")
        left, top = _GAP + place % columns * (tile + _GAP), place // columns * height
        picture.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (left, top + _GAP))
        draw.text((left, top + tile + _GAP), text, fill=colour, font=font)
    return picture


def headline(store: Store, split_name: str) -> str:
    """Name of the data, examples, and the accuracy of always guessing the majority class."""
    split = store.split(split_name)
    majority = np.bincount(split.labels).max() / len(split)
    return (
        f"{store.manifest.label}, {split_name}: {len(split):,} examples; majority baseline "
        f"{majority:.1%}"
    )


def classes(store: Store, split_name: str) -> Table:
    """Examples per class."""
    manifest, split = store.manifest, store.split(split_name)
    table = Table("class", _right("examples"), _right("share"), box=None)
    for label, count in enumerate(np.bincount(split.labels, minlength=manifest.num_classes)):
        name = manifest.class_names[label] if manifest.class_names else str(label)
        table.add_row(name, f"{count:,}", f"{count / len(split):.1%}")
    return table


def histogram(split: Split, max_length: int) -> Table:
    """How many examples have how many tokens, as bars."""
    counts, edges = np.histogram(split.lengths, bins=_BINS, range=(0, max_length))
    table = Table(_right("tokens"), _right("examples"), "", box=None)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(_BAR * count / max(1, counts.max()))
        table.add_row(f"{low:.0f}-{high:.0f}", f"{count:,}", bar)
    return table


def _right(title: str) -> Column:
    return Column(title, justify="right")


def length_picture(split: Split, manifest: Manifest) -> Any:
    """The length histogram as a figure, for `--out`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.hist(split.lengths, bins=64, range=(0, manifest.max_length), color="0.3")
    axes.set(title=f"{manifest.label}, {split.name}", xlabel="tokens", ylabel="examples")
    return figure


def snippets(store: Store, split_name: str, count: int) -> Iterator[str]:
    """The beginnings of the first `count` texts of a split, decoded, with their labels."""
    manifest, split = store.manifest, store.split(split_name)
    _check_count(count, split)
    for number in range(count):
        name = manifest.class_name(int(split.labels[number]))
        yield f"[{name}] {snippet(manifest, split, number)}"


def snippet(manifest: Manifest, split: Split, number: int) -> str:
    """The beginning of a text, decoded, in one line; of both texts of a pair."""
    decode = decode_listops if manifest.task == "listops" else decode_text
    texts = [decode(split.tokens(number, side)) for side in range(1 + manifest.paired)]
    return " || ".join(text[:_SNIPPET].replace("\n", " ") for text in texts)


def save(picture: Any, path: Path) -> None:
    """Write an image or a figure as a PNG.

    Raises:
        ConfigError: the name is no .png. DataError: the folder does not exist or is read-only.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--out {path} must end with .png.")
    with explained(path, "write"):
        write = picture.save if isinstance(picture, Image.Image) else picture.savefig
        write(path, format="png")


def _check_count(count: int, split: Split) -> None:
    if not 1 <= count <= len(split):
        raise ConfigError(f"--num {count} must lie in 1..{len(split)}, the size of {split.name}.")
