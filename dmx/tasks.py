"""The tasks of the Long Range Arena: length, vocabulary, classes, and the reference's preset.

What each one is, not where its data lie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from dmx.errors import ConfigError
from dmx.registry import Registry, choices_message

SPLITS = ("train", "dev", "test")
_SIGMAS = 5.0
"""A class's share in a random part of a set lies that far from its share in the set at most."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set as published: what a prepared one is held against.

    Attributes:
        counts: examples per split, as in SPLITS; several where the reference's files have others.
        shares: the least and the largest share of a class in a split.
    """

    counts: tuple[tuple[int, int, int], ...]
    shares: tuple[float, float]

    def lacking(self, found: Mapping[str, int]) -> str:
        """`20 of 200,000 examples` for a part of the set, "" for all of it."""
        counts = tuple(found[split] for split in SPLITS)
        if counts in self.counts:
            return ""
        ours, whole = sum(counts), sum(self.counts[0])
        if ours < whole:
            return f"{ours:,} of {whole:,} examples"
        return "/".join(f"{n:,}" for n in counts) + " examples"

    def unbalanced(self, classes: Mapping[str, Sequence[int]]) -> str:
        """`83 % of train are class 1` where no random part of the set has such labels, else "".

        `classes`: split -> examples of each class.
        """
        for split, counts in classes.items():
            total = sum(counts)
            spread = [_SIGMAS * math.sqrt(p * (1 - p) / total) for p in self.shares]
            for number, count in enumerate(counts):
                share = count / total
                if not self.shares[0] - spread[0] <= share <= self.shares[1] + spread[1]:
                    return f"{100 * share:.0f} % of {split} are class {number}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task over token sequences.

    Attributes:
        name: as typed by users and as the folder under the data root is called.
        family: what search spaces and presets go by (`pathfinder` for all of its sets).
        max_length: tokens per sequence, padding included; a power of two, as the reference rounds.
        vocab_size: ids lie in 0..vocab_size-1; id 0 is padding (or black), vocab_size-1 is CLS.
        num_classes: classes of the published data set; sample data may have others, and then win.
        paired: the input is two sequences (retrieval).
        image_side: side of the square image whose pixels are the tokens, or None.
        generated: True when dmx can make the data itself, with no download.
        published: the data set of that name in the literature; None for any other task, whose
            results stand beside no published ones.
        preset: dotted RunConfig keys to the reference's values for this task (lra_config.py of
            Solving-LRA-PathX), laid under whatever the user sets.
        cpu_steps, cpu_batch_size: a trial of a search where there is no GPU, and no more than the
            preset's: minutes, not days.
    """

    name: str
    family: str
    max_length: int
    vocab_size: int
    num_classes: int
    paired: bool = False
    image_side: int | None = None
    generated: bool = False
    published: Published | None = None
    preset: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    cpu_steps: int = 200
    cpu_batch_size: int = 32


TASKS: Registry[Task] = Registry("task")


def task_for(name: str) -> Task:
    """The task called `name`; a ConfigError lists the choices."""
    if name in TASKS:
        return TASKS.get(name)
    if (ours := _OTHER_NAMES.get(re.sub("[-_ ]", "", name.lower()))) is not None:
        raise ConfigError(f"task {name!r} is called {ours} here.")
    if (task := _custom_pathfinder(name)) is not None:
        return task
    raise ConfigError(f"task {choices_message(name, TASKS.names())}.")


_OTHER_NAMES = {
    **dict.fromkeys(("imdb", "aclimdb", "imdbreviews"), "text"),
    **dict.fromkeys(("aan", "matching"), "retrieval"),
    **dict.fromkeys(("cifar", "cifar10", "scifar10"), "image"),
    **dict.fromkeys(("pathfinder", "pathfinder32"), "pathfinder32-curv_contour_length_14"),
    "pathx": "pathfinder128-curv_contour_length_14 (as released) or pathX-cl14_nogap (generated)",
}
"""What other papers and programs call the tasks, in small letters and without hyphens."""


def task_names() -> list[str]:
    """The names of the published tasks and of those that plug-ins add, sorted."""
    return TASKS.names()


def task_families() -> set[str]:
    """What tasks may be called together, in a search space."""
    return {TASKS.get(name).family for name in TASKS.names()}


def find_task(name: str) -> Task | None:
    """The task, or None for a name that this version of dmx does not know."""
    TASKS.names()  # a plug-in that cannot be loaded is an error, and no unknown name
    try:
        return task_for(name)
    except ConfigError:
        return None


def _preset(batch_size: int, num_steps: int, evaluate: int, warmup: int) -> dict[str, object]:
    """The values of lra_config.py: those that differ (three in steps), and the rest."""
    return {
        "train.batch_size": batch_size,
        "train.num_steps": num_steps,
        "train.eval_every_steps": evaluate,
        "optim.warmup_steps": warmup,
        "optim.learning_rate": 1.0e-4,
        "optim.weight_decay": 0.0,
        "optim.anneal": "linear",
        "attention.dropout": 0.1,
    }


_TABLE = (
    # max_length, vocab_size, num_classes; examples; the least and the largest share of a class;
    # batch size, steps, steps between evaluations, steps of warm-up
    ("listops", (2048, 32, 10), (96000, 2000, 2000), (0.06, 0.18), (32, 5000, 50, 1000)),
    ("text", (4096, 512, 2), (25000, 25000, 25000), (0.5, 0.5), (32, 20000, 500, 8000)),
    ("retrieval", (4096, 512, 2), (147086, 18090, 17437), (0.4, 0.6), (32, 30000, 300, 800)),
    ("image", (1024, 512, 10), (45000, 5000, 10000), (0.1, 0.1), (256, 35000, 175, 175)),
)
"""Nested MIN/MAX/MED/SM expressions over digits; byte-level IMDB sentiment; whether one ACL
Anthology paper cites the other, two byte-level texts; CIFAR-10 in grey, one token a pixel."""
_OTHER_COUNTS = {"image": [(45002, 5000, 10000)]}
"""The reference's pickles have two training images more (docs/quirks.md)."""
_ON_CPU = {"listops": (160, 16), "text": (320, 16), "retrieval": (80, 8), "image": (200, 32)}
"""cpu_steps, cpu_batch_size."""

for _name, (_length, _vocabulary, _classes), _counts, _shares, _steps in _TABLE:
    TASKS.register(_name)(
        Task(
            name=_name,
            family=_name,
            max_length=_length,
            vocab_size=_vocabulary,
            num_classes=_classes,
            paired=_name == "retrieval",
            image_side=32 if _name == "image" else None,
            generated=_name == "listops",
            published=Published(counts=(_counts, *_OTHER_COUNTS.get(_name, ())), shares=_shares),
            preset=_preset(*_steps),
            cpu_steps=_ON_CPU[_name][0],
            cpu_batch_size=_ON_CPU[_name][1],
        )
    )


# Pathfinder: are two marked ends on the same dashed contour?
_SIDES, _CUSTOM_SIDES = (32, 64, 128, 256), (16, 32, 64, 128, 256)
_LEVELS = ("baseline", "contour_length_9", "contour_length_14")
_PATHX = re.compile(r"pathX-cl14_(nogap|alpha\d+(?:\.\d+)?)")
_CUSTOM = re.compile(r"pathfinder(\d+)-cl(\d+)-d(\d+)")
NUM_IMAGES = 200_000
"""In every published set, counted with the image files that are empty."""
EMPTY_IMAGES = {"pathfinder32-curv_baseline": 1}


def _pathfinder(name: str, side: int, published: Published | None = None) -> Task:
    return Task(
        name=name,
        family="pathfinder",
        max_length=side * side,
        vocab_size=512,
        num_classes=2,
        image_side=side,
        generated=True,
        published=published,
        preset=_preset(256, 62400, 312, 312),
    )


def _custom_pathfinder(name: str) -> Task | None:
    """A Pathfinder task that is made from its name, or None for a name of another family.

    `pathX-cl14_alpha<number>` (128 x 128, as generated by Sapkota), and
    `pathfinder<side>-cl<paddles>-d<distractors>`, for curricula of one's own.
    """
    if _PATHX.fullmatch(name):
        return _pathfinder(name, 128)
    custom = _CUSTOM.fullmatch(name)
    if custom and int(custom[1]) in _CUSTOM_SIDES:
        return _pathfinder(name, int(custom[1]))
    if name.startswith(("pathfinder", "pathX")):
        raise ConfigError(
            f"task {name!r} names no Pathfinder set; allowed: "
            "pathfinder{32,64,128,256}-curv_{baseline,contour_length_9,contour_length_14}, "
            "pathX-cl14_nogap, pathX-cl14_alpha<number>, "
            "pathfinder{16,32,64,128,256}-cl<contour length>-d<distractors>."
        )
    return None


_ALPHAS = ("0.0", "0.5", "0.75", "1.0", "1.25", "1.5")
_SETS = {f"pathfinder{side}-curv_{level}": side for side in _SIDES for level in _LEVELS}
_SETS |= dict.fromkeys(("pathX-cl14_nogap", *(f"pathX-cl14_alpha{a}" for a in _ALPHAS)), 128)

for _name, _side in _SETS.items():
    _images = NUM_IMAGES - EMPTY_IMAGES.get(_name, 0)
    _train, _dev = int(_images * 0.8), int(_images * 0.9)
    # A fair coin is tossed for each image.
    _counts = (_train, _dev - _train, _images - _dev)
    _published = Published(counts=(_counts,), shares=(0.5, 0.5))
    TASKS.register(_name)(_pathfinder(_name, _side, _published))
