"""Answers a shell that asks how a command goes on (the TAB key), by argcomplete.

`eval "$(activate-global-python-argcomplete --dest=-)"` in ~/.bashrc or ~/.zshrc makes the shell ask
`python -m dmx.tune` and its siblings themselves, with `_ARGCOMPLETE` in the environment. dmx then
gets here before anything heavy is imported, prints the possible words and exits; nothing is run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dmx.cli.leaderboard import LEADERBOARD_FORMATS
from dmx.cli.report import REPORT_FORMATS
from dmx.errors import DmxError
from dmx.registry import find_yaml, shipped_names
from dmx.schema import read_yaml
from dmx.tasks import task_names

COMMANDS = ("tune", "train", "curriculum", "data", "report", "leaderboard", "attention_maps")
PARSERS = {f"dmx.{name}": f"dmx.cli.{name}" for name in COMMANDS}
"""Command -> the module with its `parser`."""

Completer = Callable[..., Iterable[str]]


def parser_of(command: str) -> argparse.ArgumentParser:
    """A command's parser, each of its arguments with the words it may take."""
    parser: argparse.ArgumentParser = importlib.import_module(PARSERS[command]).parser()
    for action in parser._actions:  # argparse lists them nowhere else
        found = _BY_COMMAND.get((command, action.dest)) or _BY_NAME.get(action.dest)
        if found is not None and not action.choices:
            action.completer = found  # type: ignore[attr-defined]
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


def _attentions(**_: Any) -> Iterable[str]:
    """Those that ship with a search space, which are all that dmx has."""
    return shipped_names("search_spaces")


def _tasks(**_: Any) -> Iterable[str]:
    return task_names()


def _shipped_or_file(kind: str) -> Completer:
    def complete(prefix: str, **_: Any) -> Iterable[str]:
        return [*shipped_names(kind), *_paths(prefix, (".yaml", ".yml"))]

    return complete


def _runs(prefix: str, **_: Any) -> Iterable[str]:
    """Folders, from the shell's working directory on; `runs/` and what is in it come first."""
    return _paths(prefix or "runs/", ()) or _paths(prefix, ())


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
        content = read_yaml(find_yaml(str(parsed_args.curriculum), "curricula"))
    except DmxError:
        return []
    stages = content.get("stages") if isinstance(content, dict) else None
    found = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    return [str(s.get("name") or s.get("task")) for s in found]


def _paths(prefix: str, endings: tuple[str, ...]) -> list[str]:
    """Folders, and files with one of the endings, that begin with `prefix`."""
    head, tail = os.path.split(prefix)
    found = []
    for path in sorted(Path(head or ".").expanduser().glob("[!.]*")):
        if path.name.startswith(tail) and (path.is_dir() or path.suffix in endings):
            found.append(os.path.join(head, path.name) + ("/" if path.is_dir() else ""))  # noqa: PTH118
    return found


_BY_NAME: dict[str, Completer] = {
    "attention": _attentions,
    "task": _tasks,
    "space": _shipped_or_file("search_spaces"),
    "curriculum": _shipped_or_file("curricula"),
    "name": _run_names,
    "run": _runs,
    "runs": _runs,
    "warm_start": _runs,
    "checkpoint": _runs,
    "evaluate": _runs,
    "set": _settings,
    "settings": _settings,
    "until": _stages,
    "from_stage": _stages,
}
_BY_COMMAND: dict[tuple[str, str], Completer] = {
    ("dmx.data", "what"): lambda **_: ["all", "list", "show", *task_names()],
    ("dmx.report", "format"): lambda **_: REPORT_FORMATS,
    ("dmx.leaderboard", "format"): lambda **_: LEADERBOARD_FORMATS,
}
