"""Download an official archive: pooch tries again and compares the checksum, this resumes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pooch
import requests

from dmx.errors import DataError
from dmx.storage.files import exclusive_lock, explained, fsync_path, write_atomic
from dmx.terminal import progress

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 30.0
TRIES = 3
_BLOCK_BYTES = 1 << 16
_ELSEWHERE = "Download it elsewhere and pass --source FILE_OR_FOLDER."


def download(address: str, folder: Path, checksum: str = "") -> Path:
    """The file at `address`, in `folder`; nothing is fetched if it is there already.

    An interrupted download stays as `<name>.part` and is continued, provided that the server says
    it is still the same file. `checksum`: "md5:..." or "sha256:..."; "" when none is published.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        raise DataError(f"{address} is no http address.")
    name = parts.path.rsplit("/", 1)[-1]
    path, part = folder / name, folder / f"{name}.part"
    pooch.get_logger().setLevel(logging.WARNING)
    archive = pooch.create(
        folder,
        base_url="",
        registry={name: checksum or None},
        urls={name: address},
        retry_if_failed=TRIES - 1,
    )
    with exclusive_lock(folder / f".{name}.lock", name):
        if path.exists():
            return path
        if not checksum:
            log.info("no checksum is published for %s", address)
        try:
            archive.fetch(name, downloader=lambda url, out, _: _fetch(url, part, Path(out)))
        except ValueError as error:
            raise DataError(
                f"{address} gave a file with another checksum instead of {checksum}; it was "
                f"deleted. {_ELSEWHERE}"
            ) from error
        except requests.RequestException as error:
            kept = f" {part} is kept and will be continued." if part.exists() else ""
            raise DataError(
                f"Cannot download {address}: {_reason(error)}.{kept} {_ELSEWHERE}"
            ) from error
    return path


def _fetch(address: str, part: Path, out: Path) -> None:
    """Fetch what is missing of `part`, then move it to `out`."""
    tag_file = part.with_name(f"{part.name}.tag")
    have = part.stat().st_size if part.exists() else 0
    tag = tag_file.read_text() if have and tag_file.exists() else ""
    headers = {"User-Agent": "dmx", "Accept-Encoding": "identity"}
    # Without a validator a continued file might be a mixture of two versions, and a weak one may
    # not be used with If-Range (RFC 9110, 13.1.5).
    if tag and not tag.startswith("W/"):
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        code = response.status_code
        if 400 <= code < 500 and code != 416:
            raise DataError(
                f"Cannot download {address}: HTTP {code} {response.reason}. {_ELSEWHERE}"
            )
        if code != 416:  # nothing is missing
            response.raise_for_status()
            have = have if code == 206 else 0
            total = have + int(response.headers.get("Content-Length") or 0)
            with explained(part, "write"):
                tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
                write_atomic(tag_file, tag)
                file = part.open("ab" if code == 206 else "wb")
            with file, progress(out.name, total >> 20, "MiB", have >> 20) as advance:
                for block in response.iter_content(_BLOCK_BYTES):
                    with explained(part, "write"):
                        file.write(block)
                    advance((have + len(block) >> 20) - (have >> 20))
                    have += len(block)
    with explained(part, "write"):
        fsync_path(part)
        shutil.move(part, out)
        tag_file.unlink(missing_ok=True)


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    cause: Any = error.args[0] if error.args else error
    return str(getattr(cause, "reason", cause))
