"""Pathfinder images on demand: any image of any set, alone, bit for bit as the original draws it.

Every image is a square with two long target snakes of paddles (short straight dashes) among shorter
distractor snakes, with a disc on the start of one target and a disc on the end of the same target
(label 1) or of the other one (label 0). Three families of names:

- `pathX-cl14_nogap`, `pathX-cl14_alpha<float>`: 128 x 128, the interpolated difficulties of
  Sapkota and Bhattarai 2023 (arXiv 2311.18735); alpha 0 has few distractors and narrow gaps,
  alpha 1 those of Path-X.
- `pathfinder<32|64|128|256>-curv_<baseline|contour_length_9|contour_length_14>`: the sets of the
  Long Range Arena (Tay et al. 2020) with the distractor numbers of the released images.
- `pathfinder<16|32|64|128|256>-cl<C>-d<D>`: targets of C paddles among D distractors of
  max(1, C // 3) paddles, all else as in the Long Range Arena's set of that size: small steps for
  a curriculum, such as pathfinder32-cl6-d2. The 16-pixel window is this project's own; targets of
  3 to 5 paddles suit it.

The original is Sapkota's variant (github.com/bhattarailab/pathfinder-generator) of the generator of
Linsley et al. 2018 and Kim et al. 2020. Image k of a set comes from its own random stream, so
images can be made in any order and by any number of processes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmx.errors import ConfigError
from dmx.tasks import task_for

MAX_ALPHA = 2.5
"""Beyond it margins of 5 pixels occur, and two targets seldom fit: seconds to minutes an image."""
Render = Literal["original", "lra"]
LANCZOS = Image.Resampling.LANCZOS
_WORDS = 1 << 12
"""Random words drawn at a time, a power of two."""
_MOST_WORDS = 1 << 26
"""About a minute of vain attempts: the targets do not fit."""

# -- the sets -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GeneratorParameters:
    """Everything that decides an image besides the seed. Lengths are pixels of the final image."""

    window: int  # height and width of the image
    margins: tuple[int, ...]
    """Clear space around a paddle; drawn once per image. Paddles of a snake are 2 margins apart."""
    seed_distance: int
    """Between the starts of the two targets; the first keeps twice this from the border."""
    marker_radius: float
    contour_length: int  # paddles of a target snake
    distractor_length: int  # paddles of a distractor snake
    num_distractors: int
    """Distractor snakes tried; one that finds no room in five tries is left out."""
    paddle_length: int = 5
    paddle_thickness: float = 1.5  # a multiple of 1 / antialias
    padding: int = 1  # border that snakes avoid
    continuity: float = 1.8
    """How straight snakes run: the angle between paddles is scaled by it (1 = up to 90 degrees)."""
    snake_contrast: float = 0.9
    paddle_contrast: float = 1.0  # further factor on the brightness of the targets only
    antialias: int = 2  # paddles and discs are drawn this many times larger, then reduced


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
_BASES = {16: replace(_LRA_BASES[32], window=16, seed_distance=3), **_LRA_BASES}
_CONTOURS = {"curv_baseline": 6, "curv_contour_length_9": 9, "curv_contour_length_14": 14}


def parameters_for(dataset: str) -> GeneratorParameters:
    """The parameters of a data set, by its name (the families are in this file's docstring).

    Raises ConfigError for an unknown name, an alpha outside 0..2.5 or targets of one paddle.
    """
    if task_for(dataset).family != "pathfinder":
        raise ConfigError(f"{dataset!r} names no Pathfinder set.")
    family, _, kind = dataset.partition("-")
    if family == "pathX":
        alpha = kind.removeprefix("cl14_").removeprefix("alpha")
        return _nogap() if alpha == "nogap" else _interpolated(float(alpha))
    base = _BASES[int(family.removeprefix("pathfinder"))]
    if contour := _CONTOURS.get(kind, 0):
        return replace(base, contour_length=contour, distractor_length=contour // 3)
    contour, distractors = map(int, re.findall(r"\d+", kind))
    if contour < 2:
        raise ConfigError(f"{dataset}: a target of {contour} paddle(s) is none; the least is 2.")
    return replace(
        base,
        contour_length=contour,
        distractor_length=max(1, contour // 3),
        num_distractors=distractors,
    )


def _nogap() -> GeneratorParameters:
    return replace(
        _BASES[128], margins=(1,), contour_length=14, distractor_length=4, num_distractors=5
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


# -- images -------------------------------------------------------------------------------------


class Generator:
    """Draws the images of one set.

    Tables and working memory are kept between images: use one Generator for many images, and one
    per thread. numpy's and Python's global random states are neither read nor changed.

    `seed`: 0..2^32-1; the reference uses 123. `render`: "original", or "lra" for the pixel values
    of the released Long Range Arena images (the same snakes and labels; the paddles keep the
    overshoot of an unclipped Lanczos filter and are scaled to a maximum of 1 per image, the discs
    are brighter than that, the result is rounded down). Contrasts have little effect there; take
    the released number of distractors with it.

    Raises ConfigError for an unknown set, seed or rendering.
    """

    def __init__(
        self, parameters: str | GeneratorParameters, seed: int, *, render: Render = "original"
    ) -> None:
        if render not in get_args(Render):
            raise ConfigError(f"render {render!r} is unknown; choose one of {get_args(Render)}.")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"Pathfinder seed {seed} must lie in 0..2^32-1.")
        if isinstance(parameters, str):
            parameters = parameters_for(parameters)
        self.parameters = parameters
        self.render = render
        self._random = np.random.RandomState(seed)
        self._first_seed = int(self._random.randint(0, 2**31))
        self._tools: dict[int, _Tools] = {}

    def image(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image `index` (0 or more) as uint8 [window, window], and its label.

        Raises ConfigError for an index out of range, or if the target snakes find no room.
        """
        if not 0 <= index < 2**31:
            raise ConfigError(f"Pathfinder image index {index} must lie in 0..2^31-1.")
        p = self.parameters
        self._random.seed(self._first_seed + index)
        label = int(self._random.randint(0, 2))
        margin = p.margins[self._random.randint(0, len(p.margins))]
        if margin not in self._tools:
            self._tools[margin] = _Tools(p, margin, self.render)
        tools = self._tools[margin]
        used, origin = self._place(tools, index)
        lines = np.zeros((p.window, p.window), np.float32)
        paddles = tools.board.paddles[:used]
        tools.draw(tools.geometry, paddles, tools.targets, tools.distractors, lines)
        image = lines.astype(np.float64)
        raw = self.render == "lra"
        if raw:
            image /= image.max()
        for snake, end in ((origin, 0), (origin if label else 1 - origin, 1)):
            y, x = tools.board.tips[snake, end].tolist()
            add_disc(image, (y, x), p.marker_radius, p.antialias, raw=raw)
        return stretch(image, raw=raw), label

    def _place(self, tools: _Tools, index: int) -> tuple[int, int]:
        """Place the snakes of the image whose stream has begun; see place_snakes."""
        words = self._draw_words(_WORDS)
        cursor = np.zeros(1, np.int64)
        drawn = len(words)
        while drawn <= _MOST_WORDS:
            tools.board.clear()
            cursor[0] = 0
            used, origin = tools.place_snakes(tools.geometry, tools.board, words, cursor)
            if used >= 0:
                return used, origin
            # No word dropped: a single attempt takes them all, so twice as many are needed.
            fresh = self._draw_words(int(cursor[0]) or len(words))
            words = np.concatenate([words[cursor[0] :], fresh])
            drawn += len(fresh)
        raise ConfigError(
            f"Pathfinder image {index}: two snakes of {self.parameters.contour_length} paddles "
            f"find no room in {self.parameters.window} x {self.parameters.window} pixels."
        )

    def _draw_words(self, count: int) -> NDArray[np.uint32]:
        return self._random.randint(0, 2**32, size=count, dtype=np.uint32)


class _Tools:
    """Tables, working memory and pictures for one margin, with the compiled functions."""

    def __init__(self, p: GeneratorParameters, margin: int, render: Render) -> None:
        # Imported here, so that parameters can be looked up without numba and its start-up time.
        from dmx.data.pathfinder_core import draw, place_snakes
        from dmx.data.pathfinder_geometry import geometry_for, make_board, pictures_for

        self.place_snakes, self.draw = place_snakes, draw
        self.geometry = geometry_for(p, margin)
        self.board = make_board(p, self.geometry)
        pictures = pictures_for(p, margin)
        lines = pictures.raw_lines if render == "lra" else pictures.lines / 255.0
        # Double precision until the contrast is in, then single: the original's order.
        lines = lines.astype(np.float64)
        self.targets = (lines * (p.paddle_contrast * p.snake_contrast)).astype(np.float32)
        self.distractors = (lines * p.snake_contrast).astype(np.float32)


def reduce_clipped(canvas: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Lanczos reduction in 8 bits: rounded and clipped to 0..255."""
    return np.asarray(Image.fromarray(canvas).resize((width, height), LANCZOS))


def reduce_raw(canvas: NDArray[np.generic], height: int, width: int) -> NDArray[np.float32]:
    """Lanczos reduction in single precision: neither rounded nor clipped."""
    image = Image.fromarray(np.asarray(canvas, dtype=np.float32))
    return np.asarray(image.resize((width, height), LANCZOS))


def add_disc(
    image: NDArray[np.float64], tip: tuple[int, int], radius: float, antialias: int, *, raw: bool
) -> None:
    """Brighten `image` [H, W] in place by a disc around `tip` (y, x).

    raw: reduced without clipping, up to 1.16 in the middle; otherwise 0..1.
    """
    reach = math.ceil(radius) + 8  # Lanczos spreads over 3 pixels; twice as far all is 0
    spans = []
    for centre, size in zip(tip, image.shape, strict=True):
        first, last = max(0, centre - reach), min(size, centre + reach + 1)
        if first >= last:
            return
        spans.append((first, last, centre - first))
    (top, bottom, y), (left, right, x) = spans
    disc = _disc(bottom - top, right - left, y, x, radius, antialias, raw)
    part = image[top:bottom, left:right]
    np.maximum(part, disc, out=part)


@lru_cache(maxsize=1024)
def _disc(
    height: int, width: int, y: int, x: int, radius: float, antialias: int, raw: bool
) -> NDArray[np.float64]:
    """A disc around (y, x) in a cut-out [height, width], which may end at the image's border."""
    rows = np.arange(-y * antialias, (height - y) * antialias)[:, None]
    columns = np.arange(-x * antialias, (width - x) * antialias)[None, :]
    full = rows**2 + columns**2 <= (radius * antialias) ** 2
    if raw:
        return reduce_raw(full, height, width).astype(np.float64)
    return reduce_clipped(full.astype(np.uint8) * np.uint8(255), height, width) / 255.0


def stretch(image: NDArray[np.float64], *, raw: bool) -> NDArray[np.uint8]:
    """Linear map of least..greatest to 0..255, rounded to nearest: as scipy's imsave did.

    raw: of 0..greatest, rounded down: as in the released LRA images.
    """
    low, high = image.min(), image.max()
    if raw:
        return np.floor(255 * image / high).astype(np.uint8)
    scaled = (image - low) * (255.0 / ((high - low) or 1.0))
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)
