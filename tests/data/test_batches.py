"""Batches: a pure function of the step; whole epochs; the reference's own order."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from dmx.data.batches import TrainBatches, TrainOrder, eval_batches, make_batch
from tests.tiny import SIZES, examples

COUNT, SIZE, SEED = 23, 5, 9
LENGTHS = np.random.default_rng(0).integers(1, 100, COUNT)
ORDERS = ["shuffled", "bucketed", "reference"]


def stream(order: str, steps: range, seed: int = SEED) -> list[list[int]]:
    made = TrainOrder(LENGTHS, SIZE, seed, order)
    return [made(step).tolist() for step in steps]


class LRADatasetOrder:
    """The order of examples of LRADataset (LRA/code/dataset.py), seed >= 0, endless."""

    def __init__(self, count: int, seed: int) -> None:
        self.examples, self.seed, self.at = list(range(count)), seed, 0
        random.Random(self.seed).shuffle(self.examples)
        self.seed = random.Random(self.seed).randint(0, 9999999)

    def __next__(self) -> int:
        if self.at >= len(self.examples):
            random.Random(self.seed).shuffle(self.examples)
            self.seed = random.Random(self.seed).randint(0, 9999999)
            self.at = 0
        self.at += 1
        return self.examples[self.at - 1]


def test_the_references_order():
    reference = LRADatasetOrder(COUNT, SEED)
    expected = [[next(reference) for _ in range(SIZE)] for _ in range(40)]
    assert stream("reference", range(40)) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_depends_on_the_step_alone(order):
    in_order = stream(order, range(200))
    jumps = [150, 3, 3, 199, 0, 64, 63, 10, 128, 127]
    made = TrainOrder(LENGTHS, SIZE, SEED, order)
    for step in jumps:
        assert made(step).tolist() == in_order[step], step
        fresh = TrainOrder(LENGTHS, SIZE, SEED, order)
        assert fresh(step).tolist() == in_order[step], step


@pytest.mark.parametrize("order", ["shuffled", "reference"])
def test_each_epoch_is_a_permutation_and_each_is_another(order):
    flat = [i for batch in stream(order, range(COUNT * 3)) for i in batch]
    epochs = [flat[e * COUNT : (e + 1) * COUNT] for e in range(len(flat) // COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_bucketed_keeps_the_multiset_of_a_window_and_sorts_by_length():
    window = 64
    plain, bucketed = (stream(o, range(window * 2)) for o in ("shuffled", "bucketed"))
    for w in (0, window):
        same = slice(w, w + window)
        assert Counter(chain(*plain[same])) == Counter(chain(*bucketed[same]))
        spreads = [int(LENGTHS[b].max() - LENGTHS[b].min()) for b in bucketed[same]]
        assert np.mean(spreads) < 5, "lengths of a batch are alike"
        by_length = sorted(bucketed[same], key=lambda b: LENGTHS[b].sum())
        assert by_length != bucketed[same], "but the order of batches is random"
        ranges = sorted((LENGTHS[b].min(), LENGTHS[b].max()) for b in bucketed[same])
        assert all(a[1] <= b[0] for a, b in pairwise(ranges))


@pytest.mark.parametrize("order", ORDERS)
def test_seeds(order):
    assert stream(order, range(20)) == stream(order, range(20))
    assert stream(order, range(20)) != stream(order, range(20), seed=SEED + 1)


def test_a_batch_holds_the_examples_padded(tiny_store):
    truth = examples("train")
    indices = np.array([7, 0, 49, 7])
    batch = make_batch(tiny_store.split("train"), indices, 256)
    for row, index in enumerate(indices):
        ids, label = truth[index]
        assert batch.labels[row] == label
        assert batch.input_ids[row, : len(ids)].tolist() == ids.tolist()
        assert not batch.input_ids[row, len(ids) :].any()
    parts = list(batch.chunks(3))
    assert [len(p.labels) for p in parts] == [3, 1]
    assert torch.equal(torch.cat([p.input_ids for p in parts]), batch.input_ids)


def test_reading_ahead_changes_nothing(tiny_store):
    split = tiny_store.split("train")

    def order() -> TrainOrder:
        return TrainOrder(split.lengths, 8, 3, "bucketed")

    batches = TrainBatches(split, order(), 256, torch.device("cpu"))
    try:
        for step in [0, 1, 2, 70, 1, 1, 200, 64, 65, 0]:  # jumps, with a read under way
            want = make_batch(split, order()(step), 256)
            got = batches(step)
            assert torch.equal(got.input_ids, want.input_ids) and torch.equal(
                got.labels, want.labels
            )
    finally:
        batches.close()


@pytest.mark.parametrize("size", [1, 8, 37, 100])
def test_evaluation_sees_every_example_once(tiny_store, size):
    split = tiny_store.split("dev")
    batches = list(eval_batches(split, size, 256, torch.device("cpu")))
    rows = [tuple(r.tolist()) for b in batches for r in b.input_ids]
    truth = [tuple(np.pad(ids, (0, 256 - len(ids))).tolist()) for ids, _ in examples("dev")]
    assert Counter(rows) == Counter(truth) and len(rows) == SIZES["dev"]
    assert len(batches[-1].labels) == (SIZES["dev"] % size or size)
