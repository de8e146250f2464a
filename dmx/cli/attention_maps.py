"""`dmx.attention_maps`: draw where a checkpoint's layers look, for a few examples."""

from __future__ import annotations

from collections.abc import Sequence

from dmx.cli.options import Parser
from dmx.errors import EXIT_OK
from dmx.terminal import verbatim

EXAMPLES = """\
  python -m dmx.attention_maps runs/butterfly-text/best
      the maps of every layer for two dev examples, in runs/butterfly-text/attention_maps
  python -m dmx.attention_maps runs/butterfly-image/best --examples 3 17 --layers 0 --groups 8
      of the first layer, for dev examples 3 and 17, eight groups of each
  python -m dmx.attention_maps runs/softmax-listops/best --max-size 2048
      large maps, of a whole sequence
"""


def parser() -> Parser:
    """Of `python -m dmx.attention_maps`."""
    p = Parser(
        prog="dmx.attention_maps",
        description="Draw attention maps of a checkpoint into PNG files and TensorBoard.",
        examples=EXAMPLES,
    )
    p.add_argument("checkpoint", help="a checkpoint folder: runs/NAME/best")
    p.add_argument(
        "--examples",
        type=int,
        nargs="+",
        metavar="N",
        help="examples of the split, by number (default: 2 fixed ones)",
    )
    p.add_argument("--split", choices=("train", "dev", "test"), default="dev", help="default: dev")
    p.add_argument("--layers", type=int, nargs="+", metavar="N", help="from 0 (default: all)")
    p.add_argument(
        "--groups", type=int, default=4, help="groups drawn, those with most tokens (default: 4)"
    )
    p.add_argument(
        "--max-size",
        type=int,
        metavar="N",
        help="refuse maps of more positions than this (default: 1024)",
    )
    p.add_argument("--data-root", help="prepared data (default: where the run found them)")
    p.add_argument("--out", help="folder of the pictures (default: attention_maps/ beside it)")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    from dmx.training.attention_maps import draw_attention_maps

    pictures = draw_attention_maps(**vars(parser().parse_args(argv)))
    out = pictures[0].parent
    verbatim(f"{len(pictures)} pictures in {out}")
    verbatim(f"look: tensorboard --logdir {out}")
    return EXIT_OK
