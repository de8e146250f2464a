# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.leaderboard`: attentions x tasks over all runs, as markdown, LaTeX or CSV."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dmx import cli
from dmx.commands import reading_options
from dmx.errors import EXIT_OK, ConfigError
from dmx.format import MISSING, duration, percent, scaled
from dmx.registry import choices_message
from dmx.report import printable, write_whole
from dmx.reporting import markdown
from dmx.reporting.board import Board, Entry, boards, entries
from dmx.reporting.collect import collect_all, kind_of, runs_below
from dmx.reporting.plain import write_csv
from dmx.reporting.records import RunReport
from dmx.reporting.tables import make
from dmx.schema import local_path

logger = logging.getLogger("dmx.leaderboard")

NOTES = {
    "†": "steps or batch size are not the task preset's",
    "‡": "a run of it has not ended",
    "*": "of a search: the best trial's one seed, which its search chose",
    "§": "started from the weights of another run",
    "¶": "its runs ran different code, or code with changes that no commit holds",
}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = reading_options.leaderboard().parse_args(argv)
    if args.format not in FORMATS:
        raise ConfigError(f"--format {choices_message(args.format, list(FORMATS))}.")
    unread: list[str] = []
    found = entries(gather([local_path("RUN", p) for p in args.runs or ["runs"]], unread))
    text = printable(FORMATS[args.format](boards(found)))
    if args.out in (None, "-"):
        sys.stdout.write(text)
    else:
        write_whole(Path(args.out), text)
        sys.stdout.write(f"{args.out}\n")
    sys.stdout.flush()
    for sentence in unread:
        logger.warning("left out: %s", sentence)
    return EXIT_OK


def gather(paths: Sequence[Path], unread: list[str] | None = None) -> list[RunReport]:
    """Every run at or directly below the paths, each once.

    Args:
        unread: takes a sentence for each that could not be read.

    Raises:
        ConfigError: a path holds no run. DmxError: no run could be read.
    """
    folders: dict[Path, None] = {}
    asked = {path.resolve() for path in paths}
    for path in paths:
        inside = [] if kind_of(path) is not None else runs_below(path)
        for folder in inside or [path]:
            folders[folder.resolve()] = None
    found, errors = collect_all(list(folders))
    if not found:
        raise errors[0]
    if unread is not None:
        unread.extend(map(str, errors))
    return [run for run in found if run.folder in asked or not _came_to_nothing(run)]


def _came_to_nothing(run: RunReport) -> bool:
    """Whether a run failed, or was stopped, before it had anything to compare."""
    return run.kind == "run" and run.best_trial is None


def cell_text(entry: Entry | None) -> str:
    """`64.20 ± 0.31 (3)`, with the marks of NOTES."""
    if entry is None or not entry.test:
        return MISSING if entry is None else MISSING + _marks(entry)
    spread = f" ± {percent(entry.deviation)}" if math.isfinite(entry.deviation) else ""
    seeds = f" ({len(entry.test)})" if len(entry.test) > 1 else ""
    return f"{percent(entry.mean)}{spread}{seeds}{_marks(entry)}"


def _marks(entry: Entry) -> str:
    one_seed = "search" in entry.how and len(entry.test) == 1
    marks = "†" * entry.reduced + "‡" * entry.incomplete + "*" * one_seed
    return marks + "§" * bool(entry.init) + "¶" * entry.mixed_code


def _rows(board: Board) -> list[tuple[str, ...]]:
    return [(a, *(cell_text(board.cell(a, t)) for t in board.columns)) for a in board.attentions]


def _notes(board: Board) -> list[str]:
    shown = "".join(c for row in _rows(board) for c in row[1:])
    notes = ["Test accuracy in per cent: mean ± standard deviation (number of seeds)."]
    return notes + [f"{mark} {text}." for mark, text in NOTES.items() if mark in shown]


def to_markdown(found: Sequence[Board]) -> str:
    """A table of attentions x tasks and one of costs, for each kind of data."""
    parts = ["# Leaderboard"]
    for board in found:
        parts.append(f"## {markdown.escape(board.title[0].upper() + board.title[1:])}")
        if board.is_sample:
            parts.append("**Not LRA: these numbers compare only with each other.**")
        parts.append(markdown.table(make("attention|>" + "|>".join(board.columns), _rows(board))))
        parts += [markdown.escape(n) for n in _notes(board)]
        parts.append(markdown.table(make(_COSTS, [_costs(e) for e in board.entries])))
    return "\n\n".join(parts) + "\n"


_COSTS = (
    "task|attention|how|>test acc., %|>std|>seeds|>dev acc., %|>steps|>parameters|>per step"
    "|>peak memory|of|runs"
)


def _costs(e: Entry) -> tuple[str, ...]:
    dev = [v for v in e.dev if math.isfinite(v)]
    return (
        e.task,
        e.attention,
        f"{e.how}, from {e.init}" if e.init else e.how,
        percent(e.mean) + _marks(e),
        percent(e.deviation),
        str(len(e.test)),
        percent(math.fsum(dev) / len(dev)) if dev else MISSING,
        f"{e.steps:,}",
        scaled(e.parameters),
        duration(e.step_seconds),
        scaled(e.memory_mb * 2**20, "B", 1024),
        e.memory_of or MISSING,
        ", ".join(e.runs),
    )


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "*": r"$^\ast$",
    "§": r"$^\S$",
    "¶": r"$^\P$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{c: "\\" + c for c in "#$%&_"},
}
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def latex_escape(text: str) -> str:
    """A text that LaTeX sets as it is."""
    return _LATEX_SPECIAL.sub(lambda found: _LATEX[found[0]], " ".join(text.split()))


def to_latex(found: Sequence[Board]) -> str:
    """One `table` for each kind of data, with booktabs rules."""
    parts = []
    for board in found:
        columns = "l" + "r" * len(board.columns)
        head = " & ".join(latex_escape(t) for t in ("attention", *board.columns))
        rows = [" & ".join(latex_escape(c) for c in row) + r" \\" for row in _rows(board)]
        warning = "Not LRA. " if board.is_sample else ""
        title = f"{warning}{board.title[0].upper()}{board.title[1:]}."
        caption = " ".join(latex_escape(n) for n in (title, *_notes(board)))
        parts.append(
            "\n".join(
                (
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{caption}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    head + r" \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                )
            )
        )
    return "\n\n".join(parts) + "\n"


def to_csv(found: Sequence[Board]) -> str:
    """One row per entry; accuracies in 0..1."""
    return write_csv(
        [
            {
                "data": e.data,
                "is_sample": e.is_sample,
                "task": e.task,
                "attention": e.attention,
                "how": e.how,
                "init_from": e.init,
                "code": " ".join(e.code),
                "test_accuracy_mean": e.mean,
                "test_accuracy_std": e.deviation,
                "seeds": len(e.test),
                "dev_accuracy_mean": math.fsum(e.dev) / len(e.dev) if e.dev else math.nan,
                "steps": e.steps,
                "parameters": e.parameters,
                "step_seconds": e.step_seconds,
                "peak_memory_mb": e.memory_mb,
                "memory_of": e.memory_of,
                "reduced_budget": e.reduced,
                "complete": not e.incomplete,
                "runs": " ".join(e.runs),
            }
            for board in found
            for e in board.entries
        ]
    )


FORMATS: dict[str, Callable[[Sequence[Board]], str]] = {
    "md": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}


if __name__ == "__main__":
    cli.run("dmx.leaderboard", main)
