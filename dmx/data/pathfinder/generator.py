"""Pathfinder images on demand: any image of any set, alone, bit for bit as the original draws it.

The original is Sapkota's variant (arXiv 2311.18735, github.com/bhattarailab/pathfinder-generator)
of the Pathfinder generator of Linsley et al. 2018 and Kim et al. 2020. Image k of a set comes from
its own random stream, so images can be made in any order and by any number of processes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from dmx.data.pathfinder.parameters import GeneratorParameters, parameters_for
from dmx.data.pathfinder.pictures import add_disc, stretch, stretch_down
from dmx.errors import ConfigError

Render = Literal["original", "lra"]

_WORDS = 1 << 12
"""Random words drawn at a time, a power of two."""
_MOST_WORDS = 1 << 26
"""About a minute of vain attempts: the targets do not fit."""


class Sample(NamedTuple):
    """One image and what is known about it."""

    pixels: NDArray[np.uint8]
    """[window, window]"""
    label: int
    """1: both discs lie on the same snake."""
    margin: int
    """Pixels kept clear around paddles, drawn from the set's margins."""


class Generator:
    """Draws the images of one set.

    Tables and working memory are kept between images: use one Generator for many images, and one
    per thread. numpy's and Python's global random states are neither read nor changed.

    `parameters`: a set's name or its parameters. `seed`: 0..2^32-1; the reference uses 123.
    `render`: "original", or "lra" for the pixel values of the released Long Range Arena images
    (the same snakes and labels; the paddles keep the overshoot of an unclipped Lanczos filter and
    are scaled to a maximum of 1 per image, the discs are brighter than that, the result is rounded
    down). Contrasts have little effect there; take the released number of distractors with it.

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
        self.seed = seed
        self.render = render
        self._random = np.random.RandomState(seed)
        self._first_seed = int(self._random.randint(0, 2**31))
        self._tools: dict[int, _Tools] = {}

    def image(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Image `index` (0 or more) as uint8 [window, window], and its label."""
        sample = self.sample(index)
        return sample.pixels, sample.label

    def sample(self, index: int) -> Sample:
        """Image `index` with label and margin.

        Raises ConfigError for an index out of range, or if the target snakes find no room.
        """
        if not 0 <= index < 2**31:
            raise ConfigError(f"Pathfinder image index {index} must lie in 0..2^31-1.")
        p = self.parameters
        self._random.seed(self._first_seed + index)
        label = int(self._random.randint(0, 2))
        margin = p.margins[self._random.randint(0, len(p.margins))]
        tools = self._tools_for(margin)
        used, origin = self._place(tools, index)
        paddles = tools.board.paddles[:used]
        lines = np.zeros((p.window, p.window), np.float32)
        tools.draw(tools.geometry, paddles, tools.targets, tools.distractors, lines)
        image = lines.astype(np.float64)
        raw = self.render == "lra"
        if raw:
            image /= image.max()
        terminal = origin if label else 1 - origin
        for snake, end in ((origin, 0), (terminal, 1)):
            y, x = tools.board.tips[snake, end].tolist()
            add_disc(image, (y, x), p.marker_radius, p.antialias, raw=raw)
        return Sample(stretch_down(image) if raw else stretch(image), label, margin)

    def _place(self, tools: _Tools, index: int) -> tuple[int, int]:
        """Place the snakes of the image whose stream has begun, see snakes.place."""
        words = self._draw_words(_WORDS)
        cursor = np.zeros(1, np.int64)
        drawn = len(words)
        while drawn <= _MOST_WORDS:
            tools.board.clear()
            cursor[0] = 0
            used, origin = tools.place(tools.geometry, tools.board, tools.counts, words, cursor)
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

    def _tools_for(self, margin: int) -> _Tools:
        if margin not in self._tools:
            self._tools[margin] = _Tools(self.parameters, margin, self.render)
        return self._tools[margin]


class _Tools:
    """Tables, working memory and pictures for one margin, with the compiled functions."""

    def __init__(self, p: GeneratorParameters, margin: int, render: Render) -> None:
        # Imported here, so that parameters can be looked up without numba and its start-up time.
        from dmx.data.pathfinder.core import draw, place
        from dmx.data.pathfinder.geometry import Counts, geometry_for, make_board, pictures_for

        self.place, self.draw = place, draw
        self.geometry = geometry_for(p, margin)
        self.board = make_board(p, self.geometry)
        self.counts = Counts(p.contour_length, p.distractor_length, p.num_distractors)
        pictures = pictures_for(p, margin)
        lines = pictures.raw_lines if render == "lra" else pictures.lines / 255.0
        # Double precision until the contrast is in, then single: the original's order.
        self.targets = (lines.astype(np.float64) * p.target_contrast).astype(np.float32)
        self.distractors = (lines.astype(np.float64) * p.snake_contrast).astype(np.float32)


def generate(
    dataset: str | GeneratorParameters,
    seed: int,
    index: int,
    num_images: int = 200_000,
    *,
    render: Render = "original",
) -> tuple[NDArray[np.uint8], int]:
    """One image uint8 [window, window] and its label; a Generator is faster for many.

    `num_images` is the size of the set and only bounds `index`: image k does not depend on it.

    Raises ConfigError as Generator does.
    """
    if not 0 <= index < num_images:
        raise ConfigError(f"Pathfinder image index {index} must lie in 0..{num_images - 1}.")
    return Generator(dataset, seed, render=render).image(index)
