"""Answers a shell that asks how a command goes on (the TAB key), by argcomplete.

`eval "$(activate-global-python-argcomplete --dest=-)"` in ~/.bashrc or ~/.zshrc makes the shell ask
`python -m dmx.tune` and its siblings themselves, with `_ARGCOMPLETE` in the environment. dmx then
gets here before anything heavy is imported, prints the possible words and exits; nothing is run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dmx.errors import DmxError
from dmx.registry import find_yaml, shipped_names
from dmx.schema import read_yaml
from dmx.tasks import task_names

_COMMANDS = ("tune", "train", "curriculum", "data", "report", "leaderboard", "attention_maps")
PARSERS = {f"dmx.{name}": f"dmx.cli.{name}" for name in _COMMANDS}
"""Command -> the module with its `parser`."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """A command's parser, each of its arguments with the words it may take."""
    parser: argparse.ArgumentParser = importlib.import_module(PARSERS[command]).parser()
    for action in parser._actions:  # argparse lists them nowhere else
        if action.dest in _COMPLETERS and not action.choices:
            action.completer = _COMPLETERS[action.dest]  # type: ignore[attr-defined]
    return parser


def answer() -> None:
    """Where a shell asks one of the commands, print what fits and exit; else return."""
    words = sys.orig_argv
    asked = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    if not asked or asked[0] not in PARSERS:
        return
    import argcomplete

    argcomplete.autocomplete(parser_of(asked[0]))  # exits
    os._exit(1)


def _shipped_or_file(kind: str, prefix: str, **_: Any) -> Iterable[str]:
    from argcomplete.completers import FilesCompleter

    return [*shipped_names(kind), *FilesCompleter(("yaml", "yml"))(prefix)]


def _runs(prefix: str, **more: Any) -> Iterable[str]:
    """Folders, from the shell's working directory on; `runs/` and what is in it come first."""
    from argcomplete.completers import DirectoriesCompleter

    folders = DirectoriesCompleter()
    return list(folders(prefix or "runs/", **more)) or folders(prefix, **more)


def _run_names(parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    """Names below --storage, for `--resume --name`."""
    storage = Path(getattr(parsed_args, "storage", None) or "runs")
    return sorted(p.name for p in storage.glob("[!.]*") if p.is_dir())


def _settings(**_: Any) -> Iterable[str]:
    """Every setting of a run, as `a.b=`."""
    from dmx.config import parse_run_config
    from dmx.schema import flatten, to_dict

    return [f"{key}=" for key in flatten(to_dict(parse_run_config({"task": "listops"})))]


def _stages(parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    """Names of the given curriculum's stages; a stage without a name has its task's."""
    try:
        found = read_yaml(find_yaml(str(parsed_args.curriculum), "curricula")).get("stages")
    except DmxError:
        return []
    stages = [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []
    return [str(s.get("name") or s.get("task")) for s in stages]


_COMPLETERS: dict[str, Callable[..., Iterable[str]]] = {
    "attention": lambda **_: shipped_names("search_spaces"),  # which are all that dmx has
    "task": lambda **_: task_names(),
    "what": lambda **_: ["all", "list", "show", *task_names()],
    "space": functools.partial(_shipped_or_file, "search_spaces"),
    "curriculum": functools.partial(_shipped_or_file, "curricula"),
    "name": _run_names,
    **dict.fromkeys(("run", "runs", "warm_start", "checkpoint", "evaluate"), _runs),
    **dict.fromkeys(("set", "settings"), _settings),
    **dict.fromkeys(("until", "from_stage"), _stages),
}
"""By the argument's name."""
