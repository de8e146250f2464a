"""Options that say which processors share the work of one run; on a command line of any kind."""

from __future__ import annotations

import argparse


def add_options(p: argparse.ArgumentParser, run: str, *, whole_gpus: bool = False) -> None:
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
