"""The Pathfinder generator draws the original's images bit for bit, in any order, from any set."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path

import numba
import numpy as np
import pytest

from dmx.data import pathfinder, pathfinder_core
from dmx.data.pathfinder import Generator, parameters_for
from dmx.errors import ConfigError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "pathfinder_images.npz", allow_pickle=False)
LEVELS = {"6": "baseline", "9": "contour_length_9", "14": "contour_length_14"}


def golden_set(key: str) -> tuple[str, int, int]:
    """Set, seed and index of a golden array: cl14_<set>_s123_<k>, pf<N>_<cl>_s42_<k>."""
    family, kind, seed, index = key.split("_")
    if family == "cl14":
        name = f"pathX-cl14_{kind}"
    else:
        name = f"pathfinder{family[2:]}-curv_{LEVELS[kind]}"
    return name, int(seed[1:]), int(index)


@cache
def generator(name: str, seed: int, render: str = "original") -> Generator:
    return Generator(name, seed, render=render)


def test_golden_file_is_whole() -> None:
    families = Counter(key.split("_")[0] for key in GOLDEN.files)
    assert families == {"cl14": 20, "pf32": 6, "pf64": 6, "pf128": 6, "pf256": 6}


@pytest.mark.parametrize("key", GOLDEN.files)
def test_golden_image(key: str) -> None:
    name, seed, index = golden_set(key)
    pixels, label = generator(name, seed).image(index)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, GOLDEN[key])
    # Label: the first draw of the image's own stream.
    assert label == ([0, 1, 1, 1, 1] if seed == 123 else [1, 0])[index]


def test_labels_of_seed_123() -> None:
    start = np.random.RandomState(123).randint(0, 2**31)
    assert start == 843828734
    labels = [generator("pathX-cl14_alpha0.75", 123).image(index)[1] for index in range(20)]
    assert labels == [0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert labels == [generator("pathX-cl14_nogap", 123).image(index)[1] for index in range(20)]


def test_an_image_depends_on_seed_and_index_only() -> None:
    name = "pathfinder32-curv_baseline"
    alone = {index: Generator(name, 5).image(index)[0] for index in (0, 3, 7)}
    forward, backward = Generator(name, 5), Generator(name, 5)
    other = Generator("pathX-cl14_nogap", 5)
    for index in range(8):
        ours, theirs = forward.image(index)[0], backward.image(7 - index)[0]
        other.image(index)
        for found, at in ((ours, index), (theirs, 7 - index)):
            if at in alone:
                np.testing.assert_array_equal(found, alone[at])
    assert not np.array_equal(alone[0], Generator(name, 6).image(0)[0])
    assert not np.array_equal(alone[0], alone[3])


def test_an_image_handed_out_is_not_overwritten() -> None:
    drawn = Generator("pathfinder32-curv_baseline", 5)
    first = drawn.image(0)[0]
    copy = first.copy()
    drawn.image(1)
    np.testing.assert_array_equal(first, copy)


def test_size_of_a_batch_of_random_words_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that runs out of words goes on with more, wherever that happens."""
    name = "pathfinder64-curv_contour_length_9"
    images = []
    for words in (1 << 4, 1 << 8, 1 << 12, 1 << 18):
        monkeypatch.setattr("dmx.data.pathfinder._WORDS", words)
        images.append(Generator(name, 9).image(2)[0])
    for image in images[1:]:
        np.testing.assert_array_equal(image, images[0])


def test_global_random_states_are_left_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    Generator("pathfinder32-curv_baseline", 77).image(0)
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        # Pixel values of two discs in the released images, lra-data.md 5.7.
        (
            "pathfinder128-curv_contour_length_14",
            {225: 10, 228: 4, 234: 2, 235: 4, 237: 2, 245: 4, 254: 2, 255: 2},
        ),
        ("pathfinder64-curv_contour_length_14", {221: 4, 223: 2, 226: 4, 241: 4, 255: 2}),
    ],
)
def test_lra_rendering_has_the_released_discs(name: str, signature: dict[int, int]) -> None:
    radius = parameters_for(name).marker_radius
    image = np.zeros((64, 64))
    for tip in ((15, 15), (45, 40)):
        pathfinder.add_disc(image, tip, radius, 2, raw=True)
    found = Counter(pathfinder.stretch(image, raw=True).ravel().tolist())
    lowest = min(signature)
    assert {value: n for value, n in found.items() if value >= lowest} == signature


def test_lra_rendering_of_whole_images() -> None:
    name = "pathfinder128-curv_contour_length_14"
    for index in range(3):
        pixels, label = generator(name, 42, "lra").image(index)
        original, same = generator(name, 42).image(index)
        assert label == same
        # Paddles peak at 255 / 1.124; only discs are brighter.
        found = Counter(pixels[pixels > 226].tolist())
        assert found == {228: 4, 234: 2, 235: 4, 237: 2, 245: 4, 254: 2, 255: 2}
        # The same snakes: what is bright in one is lit in the other.
        assert np.all(pixels[original > 150] > 75)
        assert np.all(original[pixels > 150] > 75)
        assert not np.array_equal(pixels, original)


def test_labels_say_whether_one_snake_joins_the_discs() -> None:
    """Measured on the pixels: join lit pixels over the gap, then see if the discs hang together."""
    ndimage = pytest.importorskip("scipy.ndimage")
    joined: dict[int, list[bool]] = {0: [], 1: []}
    drawn = Generator("pathfinder128-cl9-d0", 3)
    for index in range(60):
        pixels, label = drawn.image(index)
        marks, count = ndimage.label(pixels > 240)
        if count != 2:  # the discs touch
            continue
        lit = ndimage.binary_dilation(pixels > 60, np.ones((3, 3)), iterations=3)
        snakes, _ = ndimage.label(lit)
        centres = ndimage.center_of_mass(marks > 0, marks, [1, 2])
        ends = [snakes[round(y), round(x)] for y, x in centres]
        joined[label].append(bool(ends[0] == ends[1]))
    assert min(len(found) for found in joined.values()) > 15
    assert all(joined[1])
    assert np.mean(joined[0]) < 0.75  # neighbouring snakes may touch where they start


# Window, margins, seed distance, marker radius, contour, distractor length and number, contrast.
TABLE = {
    "pathX-cl14_nogap": (128, (1,), 20, 3.0, 14, 4, 5, 0.9),
    "pathX-cl14_alpha0.0": (128, (2,), 20, 3.0, 14, 4, 5, 0.9),
    "pathX-cl14_alpha0.5": (128, (2,), 20, 3.0, 14, 4, 11, 0.83333333333),
    "pathX-cl14_alpha0.75": (128, (2, 3), 20, 3.0, 14, 4, 14, 0.799999999995),
    "pathX-cl14_alpha1.0": (128, (2, 3), 20, 3.0, 14, 4, 17, 0.76666666666),
    "pathX-cl14_alpha1.25": (128, (2, 3), 20, 3.0, 14, 4, 20, 0.7333333333250001),
    "pathX-cl14_alpha1.5": (128, (2, 3, 4), 20, 3.0, 14, 4, 23, 0.6999999999900002),
    "pathfinder32-curv_contour_length_14": (32, (1,), 7, 1.5, 14, 4, 10, 2.0),
    "pathfinder64-curv_baseline": (64, (1,), 12, 2.5, 6, 2, 11, 0.8),
    "pathfinder128-curv_contour_length_9": (128, (2, 3), 20, 3.0, 9, 3, 17, 0.9),
    "pathfinder256-curv_contour_length_14": (256, (3,), 27, 5.0, 14, 4, 15, 1.0),
    "pathfinder16-cl3-d2": (16, (1,), 3, 1.5, 3, 1, 2, 2.0),
    "pathfinder32-cl2-d0": (32, (1,), 7, 1.5, 2, 1, 0, 2.0),
    "pathfinder64-cl7-d3": (64, (1,), 12, 2.5, 7, 2, 3, 0.8),
}


@pytest.mark.parametrize("name", TABLE)
def test_parameters(name: str) -> None:
    p = parameters_for(name)
    found = (p.window, p.margins, p.seed_distance, p.marker_radius, p.contour_length)
    found += (p.distractor_length, p.num_distractors, p.snake_contrast)
    assert found == TABLE[name]


def test_small_sets_and_own_parameters() -> None:
    by_name = Generator("pathfinder32-cl6-d2", 1)
    own = Generator(parameters_for("pathfinder32-cl6-d2"), 1)
    more = Generator("pathfinder32-cl6-d9", 1)
    for index in range(5):
        pixels = by_name.image(index)[0]
        assert pixels.shape == (32, 32)
        np.testing.assert_array_equal(pixels, own.image(index)[0])
        assert (more.image(index)[0] > 60).sum() > (pixels > 60).sum()
    assert Generator("pathfinder16-cl4-d1", 1).image(0)[0].shape == (16, 16)


@pytest.mark.parametrize(
    "name",
    [
        "pathX",
        "pathX-cl14_alpha",
        "pathX-cl14_alpha-1",
        "pathX-cl9_nogap",
        "pathfinder48-curv_baseline",
        "pathfinder16-curv_baseline",
        "pathfinder32-curv_contour_length_6",
        "pathfinder20-cl6-d2",
        "pathfinder32-cl6",
        " pathX-cl14_nogap",
    ],
)
def test_unknown_set_names_the_sets(name: str) -> None:
    with pytest.raises(ConfigError, match=r"names no Pathfinder set|is unknown|is called"):
        parameters_for(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pathX-cl14_alpha2.75", "alpha must lie in 0..2.5"),
        ("pathfinder32-cl1-d2", "a target of 1 paddle.*the least is 2"),
    ],
)
def test_impossible_set_says_why(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parameters_for(name)


def test_bad_arguments() -> None:
    name = "pathfinder32-cl6-d2"
    with pytest.raises(ConfigError, match="index -1"):
        Generator(name, 1).image(-1)
    with pytest.raises(ConfigError, match="seed -3"):
        Generator(name, -3)
    with pytest.raises(ConfigError, match="'original', 'lra'"):
        Generator(name, 1, render="sapkota")  # type: ignore[arg-type]


def test_targets_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmx.data.pathfinder._MOST_WORDS", 1 << 14)
    with pytest.raises(ConfigError, match="two snakes of 60 paddles find no room in 32 x 32"):
        Generator("pathfinder32-cl60-d0", 1).image(0)


def test_random_words_read_as_numpy_draws() -> None:
    """`below` and `unit` against numpy's own methods on the same stream, mixed."""
    from dmx.data.pathfinder_core import below, unit

    bounds = np.array([2, 360, 1, 3, 16384, 5, 256, 257, 1000, 65537] * 30)

    @numba.njit
    def read(words, cursor, bounds, out):  # type: ignore[no-untyped-def]
        for n in range(bounds.size):
            out[n, 0] = below(words, cursor, bounds[n])
            out[n, 1] = unit(words, cursor)

    words = np.random.RandomState(8).randint(0, 2**32, size=4096, dtype=np.uint32)
    out = np.zeros((len(bounds), 2))
    read(words, np.zeros(1, np.int64), bounds, out)
    reference = np.random.RandomState(8)
    expected = [(reference.randint(0, bound), reference.rand()) for bound in bounds.tolist()]
    np.testing.assert_array_equal(out, np.array(expected))


@pytest.mark.parametrize("name", ["pathX-cl14_alpha0.75", "pathfinder32-curv_baseline"])
def test_free_starts_against_a_plain_dilation(name: str) -> None:
    """Bit sets, 64 pixels a word, against shifted boolean images; rows cross word borders."""
    from dmx.data.pathfinder_core import find_starts, pick_start
    from dmx.data.pathfinder_geometry import geometry_for, make_board

    parameters = parameters_for(name)
    margin = parameters.margins[-1]
    g = geometry_for(parameters, margin)
    b = make_board(parameters, g)

    @numba.njit(_nrt=False, no_cfunc_wrapper=True)  # as the core is compiled: seconds less
    def find(g, b, degree, found):  # type: ignore[no-untyped-def]
        count = find_starts(g, b, b.distractor_zone, degree)
        for rank in range(count):
            found[rank] = pick_start(g, b, rank)
        return count

    window, reach = g.window, parameters.paddle_length + margin
    rng = np.random.default_rng(4)
    free = rng.random((window, window)) < 0.995
    free[[0, -1]] = free[:, [0, -1]] = False
    for y, x in np.argwhere(~free).tolist():
        word = 1 + (y + g.bit_frame) * g.stride + 1 + x // 64
        b.free[word] &= ~(np.uint64(1) << np.uint64(x % 64))
    found = np.zeros((window * window, 2), np.int64)
    checked = 0
    for degree in range(0, 360, 3):
        # A paddle's full pixels, one pixel right and down of its start.
        square = g.masks[degree] == 255
        low = g.half - reach - 1
        kernel = np.argwhere(square[low : low + 2 * reach + 1, low : low + 2 * reach + 1]) - reach
        if not g.usable[degree] or len(kernel) == 0:
            continue
        outside = np.pad(free, reach, constant_values=True)
        expected = np.ones_like(free)
        for dy, dx in kernel.tolist():
            y, x = reach + dy, reach + dx
            expected &= outside[y : y + window, x : x + window]
        count = find(g, b, degree, found)
        np.testing.assert_array_equal(found[:count], np.argwhere(expected))
        checked += 1
    assert checked > 8


def test_compiling_without_a_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pathfinder_core.njit

    def no_cache(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(pathfinder_core, "njit", no_cache)

    def plus_one(x: int) -> int:
        return x + 1

    assert pathfinder_core.entry(plus_one)(2) == 3
