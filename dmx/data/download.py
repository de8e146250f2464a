"""Download an official archive: progress, resume after an interruption, checksum."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from dmx.data.progress import progress
from dmx.errors import DataError
from dmx.storage.files import exclusive_lock, explained, fsync_path, write_atomic

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 30.0
TRIES = 3
_BLOCK_BYTES = 1 << 20


def download(address: str, folder: Path, checksum: str = "") -> Path:
    """The file at `address`, in `folder`; nothing is fetched if it is there already.

    An interrupted download stays as `<name>.part` and is continued, provided that the server says
    it is still the same file.

    Args:
        checksum: "md5:..." or "sha256:..."; "" when none is published.

    Raises:
        DataError: the server does not answer or the checksum differs; it names the address and
            `--source`.
    """
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise DataError(f"{address} is no http address.")
    path = folder / urllib.parse.urlsplit(address).path.rsplit("/", 1)[-1]
    with exclusive_lock(folder / f".{path.name}.lock", path.name):
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            _fetch_patiently(address, part)
            _verify(part, checksum, address)
            with explained(path, "write"):
                fsync_path(part)
                part.replace(path)
                fsync_path(path.parent)
                _tag_file(part).unlink(missing_ok=True)
    return path


def _fetch_patiently(address: str, part: Path) -> None:
    for attempt in range(1, TRIES + 1):
        try:
            if _fetch(address, part):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, TLS, resets
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        log.info("%s: %s (try %d of %d)", address, reason, attempt, TRIES)
    kept = f" {part} is kept and will be continued." if part.exists() else ""
    raise DataError(
        f"Cannot download {address}: {reason}.{kept} Download it elsewhere and pass "
        "--source FILE_OR_FOLDER."
    )


def _fetch(address: str, part: Path) -> bool:
    """Fetch what is missing of `part`; False when the server stopped before the end."""
    tag_file = _tag_file(part)
    have = part.stat().st_size if part.exists() else 0
    tag = _tag(tag_file) if have else ""
    headers = {"User-Agent": "dmx", "Accept-Encoding": "identity"}
    if tag:  # without a validator a continued file might be a mixture of two versions
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    request = urllib.request.Request(address, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and tag:  # nothing is missing
            return True
        raise
    with response:
        resumed = response.status == 206
        if not resumed:
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        new_tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        with explained(part, "write"):
            write_atomic(tag_file, json.dumps(new_tag).encode())
            file = part.open("ab" if resumed else "wb")
        with file, progress(part.stem, total >> 20, "MiB", have >> 20) as advance:
            shown = have >> 20
            while block := response.read(_BLOCK_BYTES):
                with explained(part, "write"):
                    file.write(block)
                have += len(block)
                advance((have >> 20) - shown)
                shown = have >> 20
    return total == 0 or have >= total


def _verify(part: Path, checksum: str, address: str) -> None:
    if not checksum:
        log.info("no checksum is published for %s", address)
        return
    kind, _, wanted = checksum.partition(":")
    with part.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != wanted:
        part.unlink()
        _tag_file(part).unlink(missing_ok=True)
        raise DataError(
            f"{address} gave a file with {kind} {found} instead of {wanted}; it was deleted. Try "
            "again, or download it elsewhere and pass --source FILE_OR_FOLDER."
        )


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _tag(path: Path) -> str:
    try:
        tag = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ""
    # A weak tag may not be used with If-Range (RFC 9110, 13.1.5).
    return tag if isinstance(tag, str) and not tag.startswith("W/") else ""
