"""Texts that name a place: a path on this machine, or a URL of object storage."""

from __future__ import annotations

import os
from pathlib import Path

from dmx.errors import ConfigError


def expand(what: str, text: str) -> str:
    """`text`, a path that a user gave, with `~` and `~user` as a shell would write them out.

    A shell itself leaves `--option=~/x`, quoted texts, variables and YAML as they are.

    Raises:
        ConfigError: no such user; names `what`.
    """
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)  # noqa: PTH111  pathlib raises, and drops a final slash
    if not found.startswith("~"):
        return found
    user = text[1:].split("/")[0]
    why = f"this machine has no user {user!r}" if user else "no home folder is known here"
    raise ConfigError(f"{what} is {text!r}, but {why}; write the path out.")


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
