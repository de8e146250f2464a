"""How many trials share a GPU: the arithmetic, and on a GPU the measurement."""

from __future__ import annotations

import pytest
import torch

from dmx.cluster import capacity
from dmx.cluster.capacity import Usage, trials_that_fit, wanted_per_gpu
from dmx.errors import ConfigError
from dmx.schema import to_dict
from tests.tiny import config, one_sentence

GB = 2**30


@pytest.mark.parametrize(
    ("peak", "total", "expected"),
    [
        (10 * GB, 80 * GB, 7),  # 72 GB remain after the headroom
        (9 * GB, 80 * GB, 8),
        (36 * GB, 80 * GB, 2),
        (37 * GB, 80 * GB, 1),
        (79 * GB, 80 * GB, 1),  # no room to spare, but it does run alone
        (200 * GB, 80 * GB, 1),
        (GB, 80 * GB, 16),  # no more than take turns sensibly
        (0, 80 * GB, 16),
    ],
)
def test_as_many_as_fit(peak, total, expected):
    assert trials_that_fit(Usage(peak, total)) == expected


def test_the_option():
    assert wanted_per_gpu(None) is None and wanted_per_gpu("3") == 3 and wanted_per_gpu("auto") == 1
    with pytest.raises(ConfigError, match="--trials-per-gpu is 'many'") as error:
        wanted_per_gpu("many")
    one_sentence(error.value)


def test_the_largest_corner_keeps_most_memory(tiny_store):
    from dmx.costs.estimate import largest

    runs = [config(model__num_layers=n, train__batch_size=b) for n, b in ((1, 8), (3, 8), (2, 8))]
    assert largest(runs, tiny_store) == runs[1]
    micro = [config(train__micro_batch_size=2), config(train__micro_batch_size=8)]
    assert largest(micro, tiny_store) == micro[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measured_on_a_gpu(tiny_store):
    usage = capacity.peak_usage(to_dict(config()), str(tiny_store.folder))
    assert torch.cuda.max_memory_allocated() <= usage.peak < usage.total
    assert usage.total == torch.cuda.get_device_properties(0).total_memory
