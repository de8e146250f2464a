"""What is published of each task, and how a prepared set is held against it."""

from __future__ import annotations

import pytest

from dmx.errors import ConfigError
from dmx.tasks import find_task, task_for, task_names
from tests.tiny import one_sentence

# lra-data.md, section 1 and 2; the reference's own pickles of image have 45,002 for training.
PUBLISHED = {
    "listops": (96_000, 2_000, 2_000),
    "text": (25_000, 25_000, 25_000),
    "retrieval": (147_086, 18_090, 17_437),
    "image": (45_000, 5_000, 10_000),
    "pathfinder32-curv_baseline": (159_999, 20_000, 20_000),
    "pathfinder32-curv_contour_length_14": (160_000, 20_000, 20_000),
    "pathfinder128-curv_contour_length_14": (160_000, 20_000, 20_000),
    "pathX-cl14_nogap": (160_000, 20_000, 20_000),
}


def splits(counts: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("train", "dev", "test"), counts, strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_whole_set_lacks_nothing_and_every_other_is_told(name: str) -> None:
    published = task_for(name).published
    assert published is not None
    whole = PUBLISHED[name]
    assert published.lacking(splits(whole)) == ""
    train, dev, test = whole
    less = published.lacking(splits((train - 1, dev, test)))
    assert less == f"{sum(whole) - 1:,} of {sum(whole):,} examples"
    assert published.lacking(splits((train - 1, dev + 1, test))) == (
        f"{train - 1:,}/{dev + 1:,}/{test:,} examples"
    )


def test_every_published_task_has_its_facts() -> None:
    assert all(task_for(name).published is not None for name in task_names())
    image = task_for("image").published
    assert image is not None and image.lacking(splits((45_002, 5_000, 10_000))) == ""
    for other in ("pathfinder16-cl3-d1", "pathX-cl14_alpha0.33"):
        assert task_for(other).published is None
    assert find_task("parity") is None


@pytest.mark.parametrize(
    ("name", "counts", "told"),
    [
        ("text", [12_500, 12_500], ""),
        ("text", [20_000, 5_000], "80 % of train are class 0"),
        ("pathfinder32-curv_baseline", [80_300, 79_699], ""),  # a coin: sigma is 200
        ("pathfinder32-curv_baseline", [82_000, 77_999], "51 % of train are class 0"),
        ("pathfinder32-curv_baseline", [14, 2], ""),  # 3 sigma of so few
        ("pathfinder32-curv_baseline", [40, 0], "100 % of train are class 0"),
        # Shares of ListOps as measured on LRA's generator (lra-data.md, 2.1).
        ("listops", [166, 70, 80, 80, 80, 80, 95, 95, 97, 157], ""),
        ("listops", [40_000, *[6_222] * 9], "42 % of train are class 0"),
    ],
)
def test_labels_that_no_part_of_the_set_has_are_told(
    name: str, counts: list[int], told: str
) -> None:
    published = task_for(name).published
    assert published is not None
    assert published.unbalanced({"train": counts}) == told


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("imdb", "text"),
        ("IMDB", "text"),
        ("aan", "retrieval"),
        ("cifar10", "image"),
        ("CIFAR-10", "image"),
        ("pathx", "pathfinder128-curv_contour_length_14"),
        ("Path-X", "pathX-cl14_nogap"),
        ("pathfinder", "pathfinder32-curv_contour_length_14"),
    ],
)
def test_other_names_of_the_tasks_get_ours(name: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=rf"task '{name}' is called .*{ours}.* here\.") as error:
        task_for(name)
    one_sentence(error.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="task 'parity' is unknown"):
        task_for("parity")
