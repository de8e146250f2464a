"""Pathfinder data sets by name: what each one draws, and the checks that keep it drawable.

Four families of names; every one is a square image of two long target snakes of paddles (short
straight dashes) among shorter distractor snakes, with a disc on the start of one target and a
disc on the end of the same target (label 1) or of the other one (label 0):

- `pathX-cl14_nogap`, `pathX-cl14_alpha<float>`: 128 x 128, the interpolated difficulties of
  Sapkota and Bhattarai 2023 (arXiv 2311.18735); alpha 0 has few distractors and narrow gaps,
  alpha 1 those of Path-X.
- `pathfinder<32|64|128|256>-curv_<baseline|contour_length_9|contour_length_14>`: the sets of the
  Long Range Arena (Tay et al. 2020) with the distractor numbers of the released images.
- `pathfinder<16|32|64|128|256>-cl<C>-d<D>`: targets of C paddles among D distractors of
  max(1, C // 3) paddles, all else as in the Long Range Arena's set of that size: small steps for
  a curriculum, such as pathfinder32-cl6-d2. The 16-pixel window is this project's own; targets of
  3 to 5 paddles suit it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from dmx.errors import ConfigError

MAX_ALPHA = 2.5
"""Beyond it margins of 5 pixels occur, and two targets seldom fit: seconds to minutes an image."""

_PATHX_NAME = re.compile(r"pathX-cl14_(?:(nogap)|alpha(\d+(?:\.\d+)?))")
_LRA_NAME = re.compile(r"pathfinder(\d+)-curv_(\w+)")
_SMALL_NAME = re.compile(r"pathfinder(\d+)-cl(\d+)-d(\d+)")
_LRA_CONTOURS = {"baseline": 6, "contour_length_9": 9, "contour_length_14": 14}
_ALLOWED = (
    "pathX-cl14_nogap, pathX-cl14_alpha<float>, "
    "pathfinder<32|64|128|256>-curv_<baseline|contour_length_9|contour_length_14>, "
    "pathfinder<16|32|64|128|256>-cl<contour>-d<distractors>"
)


@dataclass(frozen=True, kw_only=True)
class GeneratorParameters:
    """Everything that decides an image besides the seed. Lengths are pixels of the final image.

    Raises ConfigError where the original generator would crash or never end.
    """

    window: int
    """Height and width of the image."""
    margins: tuple[int, ...]
    """Clear space around a paddle; drawn once per image. Paddles of a snake are 2 margins apart."""
    seed_distance: int
    """Between the starts of the two targets; the first keeps twice this from the border."""
    marker_radius: float
    contour_length: int
    """Paddles of a target snake."""
    distractor_length: int
    """Paddles of a distractor snake."""
    num_distractors: int
    """Distractor snakes tried; one that finds no room in five tries is left out."""
    paddle_length: int = 5
    paddle_thickness: float = 1.5
    """A multiple of 1 / antialias."""
    padding: int = 1
    """Border that snakes avoid."""
    continuity: float = 1.8
    """How straight snakes run: the angle between paddles is scaled by it (1 = up to 90 degrees)."""
    snake_contrast: float = 0.9
    paddle_contrast: float = 1.0
    """Further factor on the brightness of the targets only."""
    antialias: int = 2
    """Paddles and discs are drawn this many times larger, then reduced."""

    def __post_init__(self) -> None:
        checks = (
            ("window", self.window >= 8, "at least 8"),
            ("padding", 1 <= self.padding < self.window // 2, "1 to less than half the window"),
            ("margins", min(self.margins, default=0) >= 1, "one or more, each at least 1"),
            ("seed_distance", 0 < 4 * self.seed_distance < self.window, "1 to a quarter window"),
            ("contour_length", self.contour_length >= 2, "at least 2"),
            ("distractor_length", self.distractor_length >= 1, "at least 1"),
            ("num_distractors", self.num_distractors >= 0, "at least 0"),
            ("antialias", self.antialias >= 1, "at least 1"),
            (
                "paddle_length",
                1 <= self.paddle_length <= 20 - max(self.margins, default=0),
                "1 to 20 less the largest margin",
            ),
            (
                "paddle_thickness",
                self.paddle_thickness > 0
                and float(self.paddle_thickness * self.antialias).is_integer(),
                "a multiple of 1 / antialias above 0",
            ),
            ("marker_radius", self.marker_radius > 0, "above 0"),
            ("continuity", self.continuity >= 0, "at least 0"),
            ("snake_contrast", self.snake_contrast > 0, "above 0"),
            ("paddle_contrast", self.paddle_contrast > 0, "above 0"),
        )
        for name, holds, rule in checks:
            if not holds:
                value = getattr(self, name)
                raise ConfigError(f"Pathfinder generator: {name} is {value}, must be {rule}.")

    @property
    def target_contrast(self) -> float:
        """Brightness of a target's paddle before the final scaling to 0..255."""
        return self.paddle_contrast * self.snake_contrast


# The released images hold as many distractors as the baseline (contour 6, distractors of 2) for
# every contour length: the published script computes the number once, before it lengthens them.
_LRA_BASES = {
    32: GeneratorParameters(
        window=32, margins=(1,), seed_distance=7, marker_radius=1.5, paddle_length=2,
        paddle_thickness=0.5, continuity=1.0, snake_contrast=2.0, paddle_contrast=0.75,
        contour_length=6, distractor_length=2, num_distractors=10,
    ),
    64: GeneratorParameters(
        window=64, margins=(1,), seed_distance=12, marker_radius=2.5, paddle_thickness=1.0,
        snake_contrast=0.8, contour_length=6, distractor_length=2, num_distractors=11,
    ),
    128: GeneratorParameters(
        window=128, margins=(2, 3), seed_distance=20, marker_radius=3.0,
        contour_length=6, distractor_length=2, num_distractors=17,
    ),
    256: GeneratorParameters(
        window=256, margins=(3,), seed_distance=27, marker_radius=5.0, paddle_thickness=2.0,
        padding=22, snake_contrast=1.0, contour_length=6, distractor_length=2, num_distractors=15,
    ),
}  # fmt: skip
# Not an LRA set: the 32-pixel dashes in half the window, the starts half as far apart.
_SMALL_BASES = {16: replace(_LRA_BASES[32], window=16, seed_distance=3), **_LRA_BASES}


def parameters_for(dataset: str) -> GeneratorParameters:
    """The parameters of a data set, by its name (the families are in this file's docstring).

    Raises ConfigError for an unknown name or an alpha outside 0..2.5.
    """
    if match := _PATHX_NAME.fullmatch(dataset):
        return _nogap() if match[1] else _interpolated(float(match[2]))
    if match := _LRA_NAME.fullmatch(dataset):
        base, contour = _LRA_BASES.get(int(match[1])), _LRA_CONTOURS.get(match[2])
        if base is not None and contour is not None:
            return replace(base, contour_length=contour, distractor_length=contour // 3)
    if match := _SMALL_NAME.fullmatch(dataset):
        base = _SMALL_BASES.get(int(match[1]))
        if base is not None:
            contour = int(match[2])
            return replace(
                base,
                contour_length=contour,
                distractor_length=max(1, contour // 3),
                num_distractors=int(match[3]),
            )
    raise ConfigError(f"unknown Pathfinder set {dataset!r}; the sets are {_ALLOWED}.")


def _nogap() -> GeneratorParameters:
    return replace(
        _LRA_BASES[128], margins=(1,), contour_length=14, distractor_length=4, num_distractors=5
    )


def _interpolated(alpha: float) -> GeneratorParameters:
    """Between `nogap` with margin 2 (alpha 0) and Path-X (alpha 1), or past it.

    Source: Sapkota's generator. Each field is a * start + b * end in floating point, roundings as
    there: equal ends need not give the same number back (0.1 * 20 + 0.9 * 20 may be 19.99...).
    """
    if not 0.0 <= alpha <= MAX_ALPHA:
        raise ConfigError(f"pathX-cl14_alpha{alpha}: alpha must lie in 0..{MAX_ALPHA:g}.")
    start, end = 1 - alpha, alpha
    ends = [round(start * 2 + end * largest) for largest in (2, 3)]
    return replace(
        _nogap(),
        margins=tuple(range(min(ends), max(ends) + 1)),
        seed_distance=int(start * 20 + end * 20),
        marker_radius=start * 3 + end * 3,
        continuity=start * 1.8 + end * 1.8,
        num_distractors=max(0, math.ceil(start * 5 + end * 17)),
        snake_contrast=start * 0.9 + end * 0.76666666666,
    )
