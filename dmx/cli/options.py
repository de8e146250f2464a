"""What all commands share: a parser that speaks plainly, common options, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from dmx import process, terminal
from dmx.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    DmxError,
    RunFailedError,
)
from dmx.schema import expand

PATHS = (
    *("storage", "data_root", "space", "warm_start", "config", "init_from", "evaluate", "out"),
    *("source", "run", "runs", "resume", "checkpoint", "curriculum", "scratch", "node_data"),
)
"""Arguments that may be a path."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def duration(text: str) -> float:
    """Seconds of `90`, `90s`, `10m`, `1h30m`, `2d`; for argparse's `type`."""
    found = re.fullmatch(r"\s*(?:\d+(?:\.\d+)?\s*[smhd]\s*)+", text)
    if found:
        parts = re.findall(r"([\d.]+)\s*([smhd])", text)
        return sum(float(number) * _SECONDS[unit] for number, unit in parts)
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no duration; give seconds, or 90s, 10m, 1h30m, 2d"
        ) from None


def chosen(options: type, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are fields of a dataclass of options, by name, but for `resume`."""
    names = {f.name for f in dataclasses.fields(options)} - {"resume"}
    return {name: value for name, value in vars(args).items() if name in names}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, and whose help shows examples as they are.

    Args:
        settings: how the command takes a setting, which an unknown option may mean:
            `--set {}=VALUE`; "" where it takes none.
    """

    def __init__(self, *, prog: str, description: str, examples: str, settings: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._settings = settings

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Write `~` out, and refuse an empty path: a shell variable that was not set, no folder."""
        if not arg_string and action.dest in (*PATHS, "address"):
            raise argparse.ArgumentError(action, "it is empty; give a value, or leave it out")
        try:
            if action.dest in PATHS:
                name = next(iter(action.option_strings), None) or action.metavar or action.dest
                arg_string = expand(str(name), arg_string)
            return super()._get_value(action, arg_string)
        except DmxError as error:  # of a `type` of ours; it names the option
            raise argparse.ArgumentError(None, str(error).removesuffix(".")) from None

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The arguments that are given, without the defaults of the others."""
        unset = object()
        lists = argparse._AppendAction  # it would append to what is there
        start = {a.dest: None if isinstance(a, lists) else unset for a in self._actions}
        found = vars(self.parse_intermixed_args(argv, argparse.Namespace(**start)))
        return {k: v for k, v in found.items() if v is not unset and v not in (None, [])}

    def filled(self, values: Mapping[str, Any]) -> argparse.Namespace:
        """The arguments with the defaults of those that are not given."""
        defaults = {a.dest: a.default for a in self._actions if a.default != argparse.SUPPRESS}
        defaults |= {a.dest: [] for a in self._actions if a.nargs == "*" and a.default is None}
        return argparse.Namespace(**{**defaults, **values})

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; the usage text would bury the sentence."""
        unknown = re.match(r"unrecognized arguments: --([^\s=]+)", message)
        if unknown:
            meant = difflib.get_close_matches(f"--{unknown[1]}", self._option_string_actions, n=1)
            if self._settings:
                from dmx.config import similar_settings  # torch: seconds, spared a right command

                names = similar_settings(unknown[1], attention="none")
                meant = [self._settings.format(names)] if names else meant
            message += f"; did you mean {meant[0]}?" if meant else ""
        sys.stderr.write(f"{self.prog}: {message} (see {self.prog} --help)\n")
        raise SystemExit(EXIT_BAD_INPUT)


def run(
    prog: str,
    main: Callable[[Sequence[str]], int],
    argv: Sequence[str] | None = None,
    *,
    needs: str = "",
) -> NoReturn:
    """Call a command and turn its errors, signals and lost streams into an exit code.

    Args:
        needs: the module that it calls, whose import takes seconds; within them a signal leaves at
            once (see process.begin), since an exception may be lost in a foreign import.
    """
    argv = sys.argv[1:] if argv is None else argv
    if needs and not {"-h", "--help"} & set(argv):
        importlib.import_module(needs)
    with process.running() as out:
        terminal.setup_logging()
        try:
            code = main(argv)
        except DmxError as error:
            sys.stderr.write(f"{prog}: {error}\n")
            code = EXIT_FAILED if isinstance(error, RunFailedError) else EXIT_BAD_INPUT
        except KeyboardInterrupt:
            sys.stderr.write(f"\n{prog}: interrupted.\n")
            code = EXIT_INTERRUPTED
        except SystemExit as ended:  # of argparse
            code = ended.code if isinstance(ended.code, int) else EXIT_OK
        out.flush()
        if out.lost is not None and not out.broken:
            said = f"{prog}: standard output cannot be written ({out.lost.strerror})"
            if process.output_counts():
                sys.stderr.write(f"{said}.\n")
                code = code or EXIT_FAILED
            else:
                sys.stderr.write(f"{said}; the files hold everything.\n")
    raise SystemExit(code)


def add_resume(parser: argparse.ArgumentParser, kind: str) -> None:
    """`--resume`, alone or with the run that is meant."""
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="RUN",
        help=f"continue an existing {kind}, which knows its own options (RUN: its folder; default: "
        "what the other options name)",
    )


def add_compute(p: argparse.ArgumentParser, run: str, *, whole_gpus: bool = False) -> None:
    """Add them.

    Args:
        run: what the command calls a run, with its article. whole_gpus: no two share a GPU.
    """
    p.add_argument(
        "--gpus-per-trial",
        type=int if whole_gpus else float,
        metavar="N",
        help=f"GPUs that share {run}'s work",
    )
    p.add_argument(
        "--workers-per-trial",
        type=int,
        metavar="N",
        help=f"processes that share {run}'s work (default: one for each of its GPUs)",
    )
    p.add_argument(
        "--address", help="a running Ray cluster (auto or HOST:PORT); default: this machine"
    )


def add_places(parser: argparse.ArgumentParser) -> None:
    """--scratch and --node-data."""
    parser.add_argument(
        "--scratch",
        metavar="FOLDER",
        help="with a URL as --storage: each node's own folder for it (default: ~/.cache/dmx)",
    )
    parser.add_argument(
        "--node-data",
        metavar="FOLDER",
        help="each node copies the data it uses from --data-root (a path or URL) there, once",
    )
