"""The tasks of the Long Range Arena: length, vocabulary, classes, and the reference's preset.

What each one is, not where its data lie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
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

        Args:
            classes: split -> examples of each class.
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


@dataclass(frozen=True)
class TaskFamily:
    """Tasks that are made from their names.

    Attributes:
        find: takes a name; its task if the name belongs to the family, else None. It raises
            ConfigError where the name plainly belongs to the family but asks for the impossible.
        members: the usual names.
    """

    find: Callable[[str], Task | None]
    members: tuple[str, ...] = ()


TASKS: Registry[Task | TaskFamily] = Registry("task")


def task_for(name: str) -> Task:
    """The task called `name`.

    Raises:
        ConfigError: no task has that name.
    """
    if name in TASKS:
        value = TASKS.get(name)
        if isinstance(value, Task):
            return value
    if (ours := _OTHER_NAMES.get(re.sub("[-_ ]", "", name.lower()))) is not None:
        raise ConfigError(f"task {name!r} is called {ours} here.")
    for key in TASKS.names():
        value = TASKS.get(key)
        if not isinstance(value, Task):
            task = value.find(name)
            if task is not None:
                return task
    raise ConfigError(f"task {choices_message(name, task_names())}.")


_OTHER_NAMES = {
    **dict.fromkeys(("imdb", "aclimdb", "imdbreviews"), "text"),
    **dict.fromkeys(("aan", "matching"), "retrieval"),
    **dict.fromkeys(("cifar", "cifar10", "scifar10"), "image"),
    **dict.fromkeys(("pathfinder", "pathfinder32"), "pathfinder32-curv_contour_length_14"),
    "pathx": "pathfinder128-curv_contour_length_14 (as released) or pathX-cl14_nogap (generated)",
}
"""What other papers and programs call the tasks, in small letters and without hyphens."""


def find_task(name: str) -> Task | None:
    """The task, or None for a name that this version of dmx does not know."""
    try:
        return task_for(name)
    except ConfigError:
        return None


def task_names() -> list[str]:
    """The names of the published tasks, sorted; families (pathfinder) list their usual members."""
    names = [n for n in TASKS.names() if isinstance(TASKS.get(n), Task)]
    for key in TASKS.names():
        value = TASKS.get(key)
        if not isinstance(value, Task):
            names.extend(value.members)
    return sorted(names)


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


# Nested MIN/MAX/MED/SM expressions over digits.
TASKS.register("listops")(
    Task(
        name="listops",
        family="listops",
        max_length=2048,
        vocab_size=32,
        num_classes=10,
        generated=True,
        published=Published(counts=((96000, 2000, 2000),), shares=(0.06, 0.18)),
        cpu_steps=160,
        cpu_batch_size=16,
        preset=_preset(32, 5000, 50, 1000),
    )
)

# Byte-level IMDB sentiment.
TASKS.register("text")(
    Task(
        name="text",
        family="text",
        max_length=4096,
        vocab_size=512,
        num_classes=2,
        published=Published(counts=((25000, 25000, 25000),), shares=(0.5, 0.5)),
        cpu_steps=320,
        cpu_batch_size=16,
        preset=_preset(32, 20000, 500, 8000),
    )
)

# Does one ACL Anthology paper cite the other? Two byte-level texts.
TASKS.register("retrieval")(
    Task(
        name="retrieval",
        family="retrieval",
        max_length=4096,
        vocab_size=512,
        num_classes=2,
        paired=True,
        published=Published(counts=((147086, 18090, 17437),), shares=(0.4, 0.6)),
        cpu_steps=80,
        cpu_batch_size=8,
        preset=_preset(32, 30000, 300, 800),
    )
)

# CIFAR-10 in grey, one token a pixel.
TASKS.register("image")(
    Task(
        name="image",
        family="image",
        max_length=1024,
        vocab_size=512,
        num_classes=10,
        image_side=32,
        # The reference's pickles have two training images more (docs/quirks.md).
        published=Published(counts=((45000, 5000, 10000), (45002, 5000, 10000)), shares=(0.1, 0.1)),
        preset=_preset(256, 35000, 175, 175),
    )
)


# Pathfinder: are two marked ends on the same dashed contour?
_RELEASED = re.compile(r"pathfinder(\d+)-curv_(\w+)")
_PATHX = re.compile(r"pathX-cl14_(nogap|alpha\d+(?:\.\d+)?)")
_CUSTOM = re.compile(r"pathfinder(\d+)-cl(\d+)-d(\d+)")

SIDES = (32, 64, 128, 256)
LEVELS = ("baseline", "contour_length_9", "contour_length_14")
NUM_IMAGES = 200_000
"""In every published set, counted with the image files that are empty."""
EMPTY_IMAGES = {"pathfinder32-curv_baseline": 1}
_SHARES = (0.5, 0.5)
"""A fair coin is tossed for each image."""
MEMBERS = (
    *(f"pathfinder{side}-curv_{level}" for side in SIDES for level in LEVELS),
    "pathX-cl14_nogap",
    *(f"pathX-cl14_alpha{alpha}" for alpha in ("0.0", "0.5", "0.75", "1.0", "1.25", "1.5")),
)
"""The published Pathfinder sets."""


def _published(name: str) -> Published | None:
    if name not in MEMBERS:
        return None
    images = NUM_IMAGES - EMPTY_IMAGES.get(name, 0)
    train, dev = int(images * 0.8), int(images * 0.9)
    return Published(counts=((train, dev - train, images - dev),), shares=_SHARES)


def _task(name: str, side: int) -> Task:
    return Task(
        name=name,
        family="pathfinder",
        max_length=side * side,
        vocab_size=512,
        num_classes=2,
        image_side=side,
        generated=True,
        published=_published(name),
        preset=_preset(256, 62400, 312, 312),
    )


def pathfinder(name: str) -> Task | None:
    """The Pathfinder task called `name`, or None when the name is of another family.

    Names: `pathfinder{32,64,128,256}-curv_{baseline,contour_length_9,contour_length_14}` (as
    released), `pathX-cl14_{nogap,alpha<float>}` (128 x 128, as generated by Sapkota), and
    `pathfinder<side>-cl<paddles>-d<distractors>` (generated, for curricula of one's own).

    Raises:
        ConfigError: the name starts like a Pathfinder set but names no such set.
    """
    if _PATHX.fullmatch(name):
        return _task(name, 128)
    released = _RELEASED.fullmatch(name)
    if released and int(released[1]) in SIDES and released[2] in LEVELS:
        return _task(name, int(released[1]))
    custom = _CUSTOM.fullmatch(name)
    if custom and int(custom[1]) in (16, *SIDES):
        return _task(name, int(custom[1]))
    if name.startswith(("pathfinder", "pathX")):
        raise ConfigError(
            f"task {name!r} names no Pathfinder set; allowed: "
            "pathfinder{32,64,128,256}-curv_{baseline,contour_length_9,contour_length_14}, "
            "pathX-cl14_nogap, pathX-cl14_alpha<number>, "
            "pathfinder{16,32,64,128,256}-cl<contour length>-d<distractors>."
        )
    return None


TASKS.register("pathfinder")(TaskFamily(pathfinder, MEMBERS))
