"""The table of `python -m dmx.data list`: what is prepared, its size, checksum and origin."""

from __future__ import annotations

from pathlib import Path

from dmx.data.locate import SAMPLES_FOLDER
from dmx.data.progress import bytes_text
from dmx.data.store import open_store
from dmx.errors import DataError
from dmx.fitting import Col, FittingTable
from dmx.storage.files import MANIFEST_FILE


def store_folders(data_root: Path) -> list[Path]:
    """Folders under `data_root` that hold a store: tasks first, then samples, sorted."""
    found = [*data_root.glob(f"*/{MANIFEST_FILE}")]
    found += data_root.glob(f"{SAMPLES_FOLDER}/*/{MANIFEST_FILE}")
    return sorted((p.parent for p in found), key=lambda p: (p.parent != data_root, p.name))


def unfinished(data_root: Path) -> list[tuple[str, int]]:
    """(task, number of finished shards) of generated sets that were interrupted."""
    folders = sorted(data_root.glob(".*.shards-*"))
    return [
        (folder.name[1:].rpartition(".shards-")[0], len(list(folder.glob("[0-9]*.npz"))))
        for folder in folders
    ]


def stores_table(data_root: Path, *, verify: bool = False) -> tuple[FittingTable, int]:
    """The table, and how many of the stores are damaged.

    Args:
        verify: check every file's whole SHA-256.
    """
    numbers = ("train", "dev", "test", "tokens", "size")
    table = FittingTable(
        f"prepared in {data_root}",
        (
            Col("data", fold=True),
            *(Col(name, right=True) for name in numbers),
            Col("checksum"),
            Col("origin", fold=True),
        ),
    )
    damaged = 0
    for folder in store_folders(data_root):
        try:
            manifest = open_store(folder, verify=verify).manifest
        except DataError as error:
            damaged += 1
            table.add_row(folder.name, "", "", "", "", "", "DAMAGED", str(error), style="red")
            continue
        counts = [f"{manifest.splits[split]:,}" for split in ("train", "dev", "test")]
        if "dev" in manifest.aliases:
            counts[1] = f"= {manifest.aliases['dev']}"
        table.add_row(
            manifest.label,
            *counts,
            str(manifest.max_length),
            bytes_text(manifest.num_bytes),
            manifest.checksum[:12],
            manifest.origin,
        )
    for task, shards in unfinished(data_root):
        table.add_row(task, "", "", "", "", "", "unfinished", f"{shards} shards; run it again")
    return table, damaged
