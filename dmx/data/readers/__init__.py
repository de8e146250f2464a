"""One file per source of data; each registers itself, so a new source is one new file."""

from dmx.data.readers.base import READERS, Reader, Request

__all__ = ["READERS", "Reader", "Request"]
