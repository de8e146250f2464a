"""Write a store unless it exists: what every reader calls, safe for two processes at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmx.data.manifest import Manifest, read_manifest
from dmx.data.store_writer import AlreadyPreparedError, StoreWriter
from dmx.errors import DataError

log = logging.getLogger(__name__)


def write_store(
    folder: Path,
    manifest: Manifest,
    fill: Callable[[StoreWriter], Mapping[str, Any] | None],
    *,
    replace_existing: bool = False,
) -> None:
    """Write the store `folder` unless it exists; `fill` adds the examples.

    What `fill` returns is added to the manifest's parameters (counts of skipped examples). When
    two processes call this at once, the second waits and then uses what the first wrote.
    """
    writer = StoreWriter(folder, manifest, replace=replace_existing)
    try:
        with writer:
            parameters = {**manifest.parameters, **(fill(writer) or {})}
            writer.manifest = replace(manifest, parameters=parameters)
    except AlreadyPreparedError:
        _refuse_other(folder, manifest)
        log.info("%s is prepared already; --force replaces it", folder)


def _refuse_other(folder: Path, wanted: Manifest) -> None:
    """Raise when the store that exists is not the one asked for (other source, seed, ...)."""
    found = read_manifest(folder)
    old = {"data": found.data_name, "sizes": dict(found.splits), **found.parameters}
    new = json.loads(json.dumps({"data": wanted.data_name, **wanted.parameters}))
    differing = [key for key, value in new.items() if old.get(key) != value]
    if differing:
        has = ", ".join(f"{key}={str(old.get(key))[:60]}" for key in differing)
        asked = ", ".join(f"{key}={str(new[key])[:60]}" for key in differing)
        raise DataError(
            f"{folder} is prepared already, with {has} instead of {asked}; pass --force to replace "
            "it, or choose another --data-root."
        )
