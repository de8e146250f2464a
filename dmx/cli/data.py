"""`dmx.data`: prepare, list and show data sets."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dmx import process, terminal
from dmx.cli.options import Parser
from dmx.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK
from dmx.format import command_line
from dmx.schema import local_path
from dmx.tasks import task_for, task_names
from dmx.terminal import Column, FittingTable

logger = logging.getLogger("dmx.data")
_OPTIONS = ("num_images", "seed", "render", "num_train", "num_dev", "num_test")

USAGE = """\
python -m dmx.data TASK [--source PATH]      prepare a task; without a source it is generated or
                                             downloaded
       python -m dmx.data all --source PATH  prepare every task that PATH holds
       python -m dmx.data list [--verify]    what is prepared, its size, checksum and origin
       python -m dmx.data show TASK          sample images, or lengths, classes and snippets"""


EXAMPLES = """\
  python -m dmx.data listops
      generate ListOps with the published number of expressions
  python -m dmx.data pathX-cl14_nogap --num-images 20000 --workers 8
      a smaller Pathfinder-X set
  python -m dmx.data text --source aclImdb_v1.tar.gz --data-root /data/lra
      IMDB from its archive, into a folder that several machines see
  python -m dmx.data show listops --out lengths.png
      what a prepared task looks like

tasks: """


def parser() -> Parser:
    """All options of all four commands."""
    p = Parser(
        prog="python -m dmx.data",
        description="Prepare, list and show the data of the tasks.",
        examples=EXAMPLES + ", ".join(task_names()),
    )
    p.usage = USAGE
    p.add_argument("what", metavar="TASK|all|list|show", help="a task, or one of the three words")
    p.add_argument("task", nargs="?", help="after `show`: the task")
    there = "data are prepared in a folder; copy that there afterwards"
    root = partial(local_path, "--data-root", remedy=there)
    source, picture = (partial(local_path, option) for option in ("--source", "--out"))
    p.add_argument("--data-root", type=root, help="default: $DMX_DATA_ROOT, else ./data")
    p.add_argument("--source", type=source, help="folder, tar or zip archive to read")
    p.add_argument("--force", action="store_true", help="replace what is prepared already")
    p.add_argument("--workers", type=int, help="processes that generate; default: all CPUs")
    p.add_argument("--address", help="Ray cluster that generates instead, e.g. auto")
    p.add_argument("--num-images", type=int, help="images of a generated Pathfinder set")
    p.add_argument("--seed", type=int, help="of a generated set")
    p.add_argument("--render", choices=("original", "lra"), help="look of generated images")
    p.add_argument("--num-train", type=int, help="expressions of generated ListOps")
    p.add_argument("--num-dev", type=int, help="the same of its dev split")
    p.add_argument("--num-test", type=int, help="the same of its test split")
    p.add_argument("--verify", action="store_true", help="list: check every whole file")
    p.add_argument("--split", default="train", choices=("train", "dev", "test"), help="show")
    p.add_argument("--num", type=int, default=10, help="show: how many examples")
    p.add_argument("--out", type=picture, help="show: write the strip or histogram to this PNG")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code says whether a store is damaged, or data are lacking."""
    p = parser()
    args = p.parse_args(argv)
    if (args.what == "show") != (args.task is not None):
        p.error("show needs a task" if args.what == "show" else f"unexpected {args.task!r}")
    if args.what == "all" and args.source is None:
        p.error("all needs --source PATH")
    root = args.data_root.absolute() if args.data_root else None
    if args.what == "list":
        return _list(root, verify=args.verify)
    if args.what == "show":
        return _show(args, root)
    process.files_decide()
    try:
        with process.terminate_like_interrupt():
            return _prepare(args, root)
    except KeyboardInterrupt:
        again = command_line("dmx.data", argv)
        logger.error("interrupted; finished parts are kept, continue with: %s", again)
        return EXIT_INTERRUPTED


def _prepare(args: argparse.Namespace, root: Path | None) -> int:
    from dmx.data.prepare import prepare_all, prepare_data

    if args.what == "all":
        failed = prepare_all(args.source, root, force=args.force)
        return EXIT_BAD_INPUT if failed else EXIT_OK
    options = {name: getattr(args, name) for name in _OPTIONS}
    with _cluster(args.address):
        prepare_data(
            args.what,
            root,
            source=args.source,
            workers=args.workers,
            on_cluster=args.address is not None,
            options={name: value for name, value in options.items() if value is not None},
            force=args.force,
        )
    return EXIT_OK


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Within the block the cluster is connected; a shard that waits for room in it is spoken of."""
    if address is None:
        yield
        return
    from dmx.cluster import capacity, connection  # Ray takes seconds to import

    with connection.connect(address), capacity.for_task():
        yield


def _list(root: Path | None, *, verify: bool) -> int:
    from dmx.data import show
    from dmx.data.prepare import default_data_root

    root = root or default_data_root()
    rows = show.stores(root, verify=verify)
    if not rows:
        terminal.verbatim(f"nothing is prepared in {root}")
        return EXIT_OK
    folded = ("data", "origin")
    columns = [
        Column(name, fold=name in folded, right=name not in (*folded, "checksum"))
        for name in show.StoreRow._fields
    ]
    table = FittingTable(f"prepared in {root}", columns)
    for row in rows:
        table.add_row(*row, style="red" if row.damaged else None)
    terminal.console().print(table)
    return EXIT_BAD_INPUT if any(row.damaged for row in rows) else EXIT_OK


def _show(args: argparse.Namespace, root: Path | None) -> int:
    """Print what the data look like, and write the picture if one is asked for."""
    from dmx.data import show
    from dmx.data.prepare import open_data

    store = open_data(args.task, root, allow_sample=True)
    split, length = store.split(args.split), store.manifest.max_length
    image = task_for(args.task).image_side is not None
    path = args.out
    lines = [show.headline(store, args.split), show.classes(store, args.split)]
    if image:
        picture = show.strip(store, args.split, args.num)
        dark = (split.gather(range(min(len(split), 1000)), length) == 0).mean()
        lines.append(f"black pixels (masked by the reference): {dark:.1%}")
        path = path or Path(f"{store.manifest.task}-{args.split}.png")
    else:
        picture = show.length_picture(split, store.manifest)
        lines.append(show.histogram(split, length))
        lines += show.snippets(store, args.split, args.num)
    for line in lines:
        terminal.console().print(line, markup=False, highlight=False)  # snippets hold brackets
    if path is not None:
        show.save(picture, path)
        terminal.verbatim(f"wrote {path}")
    return EXIT_OK
