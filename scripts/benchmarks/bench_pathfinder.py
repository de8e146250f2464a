"""Images per second of dmx's Pathfinder generator, next to the original's if a checkout is given.

    python scripts/benchmarks/bench_pathfinder.py [SET ...] [--original PATH] [--images 5]
        [--repeats 3]

PATH is a checkout of github.com/bhattarailab/pathfinder-generator; it is run as it is in this
process, which needs OpenCV (pip install opencv-python-headless) and a stand-in for the parts of
scipy and numpy that have since been removed. Both draw the same images, in turn; each image counts
with the median of its repeats, and every pair of images is compared bit for bit. Images differ
much in cost, so the ratio is that of the sums. Times are CPU seconds of one thread, which other
work on the machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dmx.data.pathfinder import Generator, GeneratorParameters

SETS = (
    "pathX-cl14_nogap",
    "pathX-cl14_alpha0.0",
    "pathX-cl14_alpha0.75",
    "pathX-cl14_alpha1.25",
    "pathfinder32-curv_contour_length_14",
    "pathfinder64-curv_contour_length_14",
    "pathfinder128-curv_contour_length_14",
    "pathfinder256-curv_contour_length_14",
)
Pixels = NDArray[np.uint8]


class Original:
    """The original generator, asked for one image at a time."""

    def __init__(self, checkout: Path) -> None:
        self._saved: list[Pixels] = []
        self._install_stand_ins()
        sys.path.insert(0, str(checkout))
        import cv2
        import snakes2

        cv2.setNumThreads(1)
        self._module: Any = snakes2
        self._folder = tempfile.TemporaryDirectory()

    def image(self, p: GeneratorParameters, seed: int, index: int) -> Pixels:
        """A batch of one image whose batch number is the index: image `index` of the set."""
        folder = tempfile.mkdtemp(dir=self._folder.name)
        settings = types.SimpleNamespace(
            contour_path=folder, batch_id=index, n_images=1, seed=seed,
            window_size=[p.window, p.window], padding=p.padding, antialias_scale=p.antialias,
            seed_distance=p.seed_distance, marker_radius=p.marker_radius,
            contour_length=p.contour_length, distractor_length=p.distractor_length,
            num_distractor_snakes=p.num_distractors, snake_contrast_list=[p.snake_contrast],
            paddle_contrast_list=[p.paddle_contrast], paddle_length=p.paddle_length,
            paddle_thickness=p.paddle_thickness, paddle_margin_list=list(p.margins),
            continuity=p.continuity, max_distractor_contour_retrial=4, max_paddle_retrial=2,
            use_single_paddles=False, segmentation_task=False, pause_display=False,
            save_images=True, save_metadata=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            self._module.from_wrapper(settings)
        return self._saved.pop()

    def _install_stand_ins(self) -> None:
        """scipy.misc as of scipy 0.19, and two names that numpy 2 dropped."""

        def to_bytes(array: NDArray[Any]) -> Pixels:
            array = np.asarray(array)
            if array.dtype == np.uint8:
                return array
            low, high = array.min(), array.max()
            factor = 255.0 / ((high - low) or 1)
            return (((array - low) * factor).clip(0, 255) + 0.5).astype(np.uint8)

        def imresize(array: NDArray[Any], size: tuple[int, int], interp: str) -> Pixels:
            if interp != "lanczos":
                raise ValueError(interp)
            image = Image.fromarray(to_bytes(array))
            return np.array(image.resize((size[1], size[0]), Image.Resampling.LANCZOS))

        misc = types.ModuleType("scipy.misc")
        misc.imresize = imresize  # type: ignore[attr-defined]
        misc.imsave = lambda _, array: self._saved.append(to_bytes(array))  # type: ignore[attr-defined]
        import scipy

        sys.modules["scipy.misc"] = misc
        scipy.misc = misc
        np.float = float  # type: ignore[attr-defined]
        np.round_ = np.round  # type: ignore[attr-defined]


def seconds(action: Callable[[], Pixels]) -> tuple[float, Pixels]:
    """CPU time of a call, and its result."""
    start = time.process_time()
    pixels = action()
    return time.process_time() - start, pixels


def bench(name: str, args: argparse.Namespace, original: Original | None) -> None:
    """Print one line of the table."""
    generator = Generator(name, args.seed)
    indices = range(args.first, args.first + args.images)
    for index in range(args.first, args.first + 20):  # builds tables, compiles or loads the core
        generator.image(index)
    ours: list[list[float]] = [[] for _ in indices]
    theirs: list[list[float]] = [[] for _ in indices]
    unequal = 0
    for _ in range(args.repeats):
        for n, index in enumerate(indices):
            duration, pixels = seconds(lambda index=index: generator.image(index)[0])
            ours[n].append(duration)
            if original is not None:
                duration, reference = seconds(
                    lambda index=index: original.image(generator.parameters, args.seed, index)
                )
                theirs[n].append(duration)
                unequal += not np.array_equal(pixels, reference)
    own = sum(statistics.median(times) for times in ours) / args.images
    line = f"{name:40} {own * 1e3:9.2f} {1 / own:9.1f}"
    if original is not None:
        other = sum(statistics.median(times) for times in theirs) / args.images
        line += f" {other * 1e3:12.1f} {other / own:8.0f} {unequal:9d}"
    print(line, flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=SETS, metavar="SET", help="default: eight sets")
    parser.add_argument("--original", type=Path, help="checkout of the original generator")
    parser.add_argument("--images", type=int, default=5, help="per set (default 5)")
    parser.add_argument("--first", type=int, default=0, help="index of the first image")
    parser.add_argument("--repeats", type=int, default=3, help="of each image (default 3)")
    parser.add_argument("--seed", type=int, default=123)
    args = parser.parse_args()
    original = Original(args.original) if args.original else None
    line = f"{'set':40} {'dmx ms':>9} {'images/s':>9}"
    if original is not None:
        line += f" {'original ms':>12} {'ratio':>8} {'unequal':>9}"
    print(line)
    for name in args.sets:
        bench(name, args, original)


if __name__ == "__main__":
    main()
