# PYTHON_ARGCOMPLETE_OK
"""`python -m dmx.attention_maps`: draw where a checkpoint's layers look, for a few examples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dmx.cli.attention_maps import MAPPED_EXAMPLES, parser
from dmx.cli.options import run
from dmx.data.batches import make_batch
from dmx.data.prepare import open_data
from dmx.data.show import class_name, pictures, snippet
from dmx.data.store import Split
from dmx.errors import EXIT_OK, ConfigError
from dmx.runs.layout import STEPS
from dmx.schema import local_path
from dmx.storage.files import explained
from dmx.tensorboard import RunWriter
from dmx.terminal import verbatim
from dmx.training import attention_maps as maps
from dmx.training.checkpoint import meant_checkpoint, open_checkpoint
from dmx.training.predictions import choose_samples
from dmx.training.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    folder = meant_checkpoint(local_path("CHECKPOINT", args.checkpoint))
    checkpoint = open_checkpoint(folder)
    config = maps.dense(checkpoint.config)
    length = config.model.max_length or config.task_info.max_length
    for option, value in (("--groups", args.groups), ("--max-size", args.max_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; it must be at least 1.")
    maps.check_has_maps(config.attention, length, args.max_size or maps.MAX_SIZE)
    layers = _within(args.layers, config.model.num_layers, "--layers", "layers of the model")
    root = args.data_root or config.data.root
    store = open_data(
        config.task,
        None if root is None else local_path("--data-root", root),
        allow_sample=True,
        generate=False,
    )
    split = store.split(args.split)
    chosen = args.examples or choose_samples(split)[:MAPPED_EXAMPLES].tolist()
    examples = _within(chosen, len(split), "--examples", f"{args.split} examples")
    out = Path(args.out) if args.out else folder.absolute().parent / "attention_maps"
    trainer = Trainer(config, store)
    try:
        trainer.load_weights(checkpoint)
        with _writer(out) as writer:
            drawing = _Drawing(trainer, split, layers, args.groups, out, writer)
            step = int(checkpoint.metrics.get(STEPS, 0))
            count = sum(drawing.example(index, step) for index in examples)
    finally:
        trainer.close()
    verbatim(f"{count} pictures in {out}")
    verbatim(f"look: tensorboard --logdir {out}")
    return EXIT_OK


def _within(given: list[int] | None, count: int, option: str, what: str) -> list[int]:
    """The given numbers, or all; each must be one of 0..count-1."""
    numbers = list(range(count)) if given is None else given
    for number in numbers:
        if not 0 <= number < count:
            raise ConfigError(f"{option} {number} must lie in 0..{count - 1}, the {what}.")
    return numbers


@contextlib.contextmanager
def _writer(out: Path) -> Iterator[RunWriter]:
    """TensorBoard's writer in the folder, which is made.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        writer = RunWriter(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); give another --out."
        ) from None
    try:
        yield writer
    finally:
        writer.close()


@dataclass(frozen=True)
class _Drawing:
    """What is drawn, with what, and whereto."""

    trainer: Trainer
    split: Split
    layers: list[int]
    num_groups: int
    out: Path
    writer: RunWriter

    def example(self, index: int, step: int) -> int:
        """Draw one example; how many pictures that made."""
        trainer = self.trainer
        batch = make_batch(self.split, np.array([index]), trainer.length).to(trainer.device)
        probabilities = trainer.probabilities(batch)[0]
        manifest = trainer.store.manifest
        said, label = int(probabilities.argmax()), int(batch.labels[0])
        side = trainer.config.task_info.image_side
        text = (
            f"{self.split.name} example {index} of {manifest.label}: "
            f"label {class_name(manifest, label)}, prediction {class_name(manifest, said)} "
            f"({float(probabilities[said]):.3f})"
        )
        if side is None:
            text += "\n\n    " + snippet(manifest, self.split, index)
        self.writer.text(f"example_{index}", text, step)
        count = 0
        for found in maps.layer_maps(trainer.model, batch):
            if found.layer not in self.layers:
                continue
            second = "-second" if found.sequence else ""
            name = f"layer-{found.layer}{second}"
            groups = maps.busiest_groups(found, self.num_groups)
            self._save(index, name, maps.draw_maps(found, groups), step)
            count += 1
            if side is not None:
                picture = maps.draw_received(found, side)
                self._save(index, f"received-{name}", picture, step)
                count += 1
        if side is not None:
            caption = (f"label {label}, prediction {said}", "black")
            picture = pictures(trainer.store, self.split.name, [index], [caption])
            self._save(index, "input", picture, step)
            count += 1
        return count

    def _save(self, index: int, name: str, picture: Image.Image, step: int) -> None:
        with explained(self.out, "write"):
            picture.save(self.out / f"example-{index}-{name}.png", format="PNG")
        self.writer.image(f"example_{index}/{name}", picture, step)


if __name__ == "__main__":
    run("dmx.attention_maps", main)
