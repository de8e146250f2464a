"""Sizes that cannot work are refused before training, in one sentence that says what would."""

import pytest

from dmx.attention import AttentionConfig, MixerContext
from dmx.errors import ConfigError

AT_PARSE = [
    ("nystrom-0", ["num_landmarks is 0", "at least 1"]),
    ({"name": "nystrom", "conv_kernel_size": 4}, ["conv_kernel_size is 4", "odd"]),
    ({"name": "nystrom", "conv_kernel_size": -3}, ["conv_kernel_size is -3", "positive"]),
    ({"name": "nystrom", "inverse_init": "best"}, ["inverse_init", "'best'", "per_matrix"]),
    ("linformer-0", ["projection_dim is 0", "at least 1"]),
    ("performer-0", ["num_features is 0", "at least 1"]),
    ({"name": "performer", "kernel": "gelu"}, ["kernel", "'gelu'", "relu"]),
    ({"name": "performer", "redraw_every_steps": -1}, ["redraw_every_steps is -1"]),
    ("reformer-0", ["num_hashes is 0", "at least 1"]),
    ({"name": "reformer", "chunk_length": 0}, ["chunk_length is 0", "at least 1"]),
    ("butterfly-1", ["block_size is 1", "at least 2"]),
    ({"name": "linear", "dropout": 1.0}, ["dropout is 1.0", "[0, 1)"]),
    ("linear-64", ["'linear' has no size"]),
    ("none-4", ["'none' has no size"]),
    ("nystrm-64", ["nystrm", "nystrom"]),
    ({"name": "performer", "num_feature": 8}, ["attention.num_feature", "num_features"]),
    ({"name": "nystrom", "num_landmarks": 8.5}, ["num_landmarks", "8.5", "whole number"]),
    ({"name": "butterfly", "inner": "butterfly-4"}, ["inner is butterfly"]),
    ({"name": "butterfly", "inner": "reformer-0"}, ["num_hashes is 0"]),
]

AT_CHECK = [
    ("nystrom-48", ["num_landmarks is 48", "divide the length 64"]),
    ("nystrom-128", ["num_landmarks is 128", "length 64"]),
    ("linformer-128", ["projection_dim is 128", "at most the length 64"]),
    ({"name": "reformer", "chunk_length": 48}, ["chunk_length is 48", "divide the length 64"]),
    ("butterfly-48", ["block_size is 48", "length 64"]),
    ("butterfly-128", ["block_size is 128", "length 64"]),
    ({"name": "butterfly", "block_size": 16, "inner": "nystrom-32"}, ["inner: num_landmarks"]),
    ({"name": "butterfly", "block_size": 16, "inner": "linformer-32"}, ["inner: projection_dim"]),
    (
        {"name": "butterfly", "block_size": 32, "inner": {"name": "reformer", "chunk_length": 24}},
        ["inner: chunk_length is 24", "length 32"],
    ),
]


@pytest.mark.parametrize(("value", "fragments"), AT_PARSE, ids=str)
def test_refused_when_parsed(value, fragments):
    with pytest.raises(ConfigError) as error:
        AttentionConfig.parse(value, "attention")
    assert_clear(error, fragments)
    assert "attention" in str(error.value)


@pytest.mark.parametrize(("value", "fragments"), AT_CHECK, ids=str)
def test_refused_when_checked(value, fragments):
    settings = AttentionConfig.parse(value, "attention")
    with pytest.raises(ConfigError) as error:
        settings.check(MixerContext(length=64, num_heads=2, head_dim=8))
    assert_clear(error, fragments)


def assert_clear(error, fragments):
    message = str(error.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message and message.endswith(".")
