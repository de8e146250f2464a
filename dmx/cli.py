"""What all commands share: argument parsing that speaks plainly, and exit codes."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dmx import log
from dmx.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, DmxError

logger = logging.getLogger("dmx")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, and whose help shows examples as they are."""

    def __init__(self, *, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; the usage text would bury the sentence."""
        sys.stderr.write(f"{self.prog}: {message} (see {self.prog} --help)\n")
        raise SystemExit(EXIT_BAD_INPUT)


def run(
    prog: str, main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None
) -> NoReturn:
    """Call a command and turn its errors into one sentence and an exit code."""
    log.setup()
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except DmxError as error:
        sys.stderr.write(f"{prog}: {error}\n")
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{prog}: interrupted.\n")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe went away
        code = 0
    sys.stdout.flush()
    raise SystemExit(code)


def command_line(module: str, argv: Sequence[str], *, add: str = "") -> str:
    """The command as a user would type it again, with an option added."""
    words = [*argv, *([add] if add and add not in argv else [])]
    return f"python -m {module} " + " ".join(shlex.quote(word) for word in words)
