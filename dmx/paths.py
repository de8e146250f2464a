"""Texts that name a place: a path on this machine, or a URL of object storage."""

from __future__ import annotations

from pathlib import Path

from dmx.errors import ConfigError


def is_url(text: str) -> bool:
    """Whether `text` names object storage and not a path."""
    return "://" in text


def local_path(option: str, text: str, remedy: str = "copy it here and name the copy") -> Path:
    """`text` as a path on this machine.

    Raises:
        ConfigError: it is a URL, of which pathlib would make a folder `s3:` here; names the option
            and ends with the remedy.
    """
    if is_url(text):
        raise ConfigError(f"{option} {text} is in object storage; {remedy}.")
    return Path(text)
