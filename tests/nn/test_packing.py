"""Layouts hold every real token once, in groups; moving between them is exact."""

from __future__ import annotations

import pytest
import torch

from dmx.nn.packing import Grouping, from_groups, pack, reorder, to_groups

LENGTH = 48
GROUPINGS = [Grouping(LENGTH), Grouping(8), Grouping(8, 6), Grouping(4, 4), Grouping(4, 12)]


def random_mask(seed: int, density: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(5, LENGTH, generator=generator) < density
    mask[1] = False  # a sequence of nothing
    mask[3] = True
    return mask


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_layout_is_what_its_definition_says(grouping, seed):
    """Against plain loops: group of position p is (p // (size * stride), p % stride)."""
    mask = random_mask(seed)
    packing = pack(mask)
    layout = packing.layout(grouping)
    total = int(mask.sum())
    assert packing.sequence.shape[0] == total
    assert sorted(layout.order.tolist()) == list(range(total))
    assert layout.order[layout.inverse].tolist() == list(range(total))

    row = 0
    seen = set()
    for bucket in layout.buckets:
        assert bucket.start == row and bucket.count > 0 and bucket.length > 0
        for _ in range(bucket.count):
            tokens = layout.order[row : row + bucket.length]
            places = {
                (
                    int(packing.sequence[t]),
                    int(packing.position[t]) // (grouping.size * grouping.stride),
                    int(packing.position[t]) % grouping.stride,
                )
                for t in tokens
            }
            assert len(places) == 1, "the tokens of a group belong together"
            sequence, block, offset = places.pop()
            first = block * grouping.size * grouping.stride + offset
            members = [first + j * grouping.stride for j in range(grouping.size)]
            real = [p for p in members if mask[sequence, p]]
            assert packing.position[tokens].tolist() == real, "all of the group, and in order"
            slots = layout.slot[row : row + bucket.length].tolist()
            assert [members[s] for s in slots] == real
            assert (sequence, block, offset) not in seen
            seen.add((sequence, block, offset))
            row += bucket.length
        assert row == bucket.start + bucket.rows
    assert row == total
    lengths = [bucket.length for bucket in layout.buckets]
    assert lengths == sorted(set(lengths))


def test_nothing_real_gives_an_empty_layout():
    packing = pack(torch.zeros(3, LENGTH, dtype=torch.bool))
    layout = packing.layout(Grouping(8, 6))
    assert layout.buckets == () and layout.order.numel() == 0


@pytest.mark.parametrize(
    ("grouping", "mask", "natural"),
    [
        (Grouping(8), torch.ones(2, LENGTH, dtype=torch.bool), True),
        (Grouping(8, 6), torch.ones(2, LENGTH, dtype=torch.bool), False),
        (Grouping(8), random_mask(0), False),
    ],
)
def test_natural_says_whether_the_order_is_ascending(grouping, mask, natural):
    layout = pack(mask).layout(grouping)
    assert layout.natural == natural
    assert (layout.order.tolist() == sorted(layout.order.tolist())) == natural


def test_groups_are_rows_and_come_back():
    positions = torch.arange(24).repeat(2, 1)
    groups = to_groups(positions, Grouping(size=3, stride=4))
    assert groups[:5].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11], [12, 16, 20]]
    assert torch.equal(from_groups(groups, Grouping(size=3, stride=4), 24), positions)


@pytest.mark.parametrize("mask", [random_mask(7), torch.ones(2, LENGTH, dtype=torch.bool)])
def test_reorder_moves_rows_and_gradients(mask):
    """Each row keeps its token's number through every layout, and its own gradient comes back."""
    packing = pack(mask)
    numbers = torch.arange(packing.sequence.shape[0], dtype=torch.float64)[:, None].requires_grad_()
    x, current = numbers, None
    for grouping in (*GROUPINGS, GROUPINGS[0]):
        wanted = packing.layout(grouping)
        x = reorder(x, current, wanted)
        current = wanted
        assert torch.equal(x[:, 0].detach(), wanted.order.double())
    weight = torch.randn(packing.sequence.shape[0], 1, dtype=torch.float64)
    (x * weight).sum().backward()
    expected = torch.empty_like(weight)
    expected[current.order] = weight
    assert torch.equal(numbers.grad, expected)


def test_a_layout_is_computed_once():
    packing = pack(random_mask(1))
    assert packing.layout(Grouping(8)) is packing.layout(Grouping(size=8, stride=1))
