"""The store: what is written comes back; torn, edited and half-written data are never accepted."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from dmx.data import store_writer
from dmx.data.store import Manifest, open_store
from dmx.data.store_writer import StoreWriter, write_store
from dmx.errors import DataError
from tests.tiny import one_sentence

TEXTS = [[5, 9, 1], [256, 1, 2, 3, 4, 5], [], [7]]


def manifest(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "task": "text",
        "data_name": "lra-text",
        "origin": "a test",
        "num_classes": 2,
        "max_length": 16,
        "vocab_size": 512,
        "dtype": "uint16",
    }
    return Manifest(**(values | changes))  # type: ignore[arg-type]


def fill(writer: StoreWriter) -> None:
    for split in ("train", "test"):
        for k, ids in enumerate(TEXTS):
            writer.add(split, np.array(ids, np.uint16), k % 2)
    writer.place("dev", range(4, 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_store(tmp_path / "text", manifest(), fill)
    return tmp_path / "text"


def test_variable_lengths_come_back_padded_and_are_never_cut(folder: Path) -> None:
    split = open_store(folder).split("train")
    assert len(split) == 4
    assert split.labels.tolist() == [0, 1, 0, 1]
    assert split.lengths.tolist() == [3, 6, 0, 1]
    assert split.tokens(1).tolist() == TEXTS[1]
    assert split.tokens(-1).tolist() == [7]
    got = split.gather(np.array([3, 1, 2]), 7)
    assert got.dtype == np.uint16
    assert got.tolist() == [[7] + [0] * 6, [*TEXTS[1], 0], [0] * 7]
    assert split.gather([3, 0], 3).tolist() == [[7, 0, 0], TEXTS[0]]
    with pytest.raises(DataError, match="an example of 6 tokens in split train, more than the 5"):
        split.gather([3, 1], 5)
    with pytest.raises(IndexError):
        split.tokens(4)


def test_fixed_lengths_come_back_exact_or_padded_and_are_never_cut(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2 * 3, 4)

    def fill_images(writer: StoreWriter) -> None:
        for split in ("train", "dev", "test"):
            writer.add_rows(split, images[:4], [0, 1, 1, 0])
            writer.add_rows(split, images[4:], [1, 0])

    write_store(tmp_path / "image", manifest(dtype="uint8"), fill_images)
    split = open_store(tmp_path / "image").split("dev")
    assert (split.gather([5, 0], 4) == images[[5, 0]]).all()
    assert split.gather([1], 6).tolist() == [[4, 5, 6, 7, 0, 0]]
    with pytest.raises(DataError, match="an example of 4 tokens in split dev, more than the 2"):
        split.gather([1], 2)
    assert split.gather([1], 4).dtype == np.uint8
    assert (tmp_path / "image" / "tokens.bin").read_bytes() == images.tobytes() * 3


def test_dev_is_test_without_a_second_copy(folder: Path) -> None:
    store = open_store(folder)
    assert dict(store.manifest.splits) == {"train": 4, "dev": 4, "test": 4}
    assert store.split("dev").tokens(1).tolist() == TEXTS[1]
    assert (folder / "tokens.bin").stat().st_size == 2 * 2 * sum(map(len, TEXTS))
    with pytest.raises(DataError, match="no split 'valid'"):
        store.split("valid")


def test_splits_are_lists_of_examples_in_any_order(tmp_path: Path) -> None:
    def placed(writer: StoreWriter) -> None:
        writer.add_rows(None, np.arange(12, dtype=np.uint8).reshape(6, 2), [0, 1, 0, 1, 0, 1])
        writer.place("train", [4, 1])
        writer.place("train", [3])
        writer.place("dev", [0])
        writer.place("test", [5, 2])

    write_store(tmp_path / "text", manifest(), placed)
    store = open_store(tmp_path / "text")
    train = store.split("train")
    assert train.labels.tolist() == [0, 1, 1]
    assert train.gather([0, 1, 2], 2).tolist() == [[8, 9], [2, 3], [6, 7]]
    assert store.split("test").tokens(0).tolist() == [10, 11]
    assert (tmp_path / "text" / "tokens.bin").read_bytes() == np.arange(12, dtype="<u2").tobytes()


def test_pairs_keep_both_sides(tmp_path: Path) -> None:
    def fill_pairs(writer: StoreWriter) -> None:
        for split in ("train", "dev", "test"):
            writer.add(split, [1, 2], 1, [3])
            writer.add(split, [4], 0, [5, 6, 7])

    write_store(tmp_path / "retrieval", manifest(paired=True), fill_pairs)
    split = open_store(tmp_path / "retrieval").split("test")
    assert split.tokens(1, 1).tolist() == [5, 6, 7]
    assert split.gather([1, 0], 4, 1).tolist() == [[5, 6, 7, 0], [3, 0, 0, 0]]
    assert split.lengths.tolist() == [2, 1]


def test_label_names_the_data() -> None:
    assert manifest().label == "text"
    assert manifest(is_sample=True, data_name="sample-bbc").label == "sample-bbc, not LRA"
    assert manifest(note="generated").label == "text (generated)"
    part = manifest(note="generated", partial="12 of 75,000 examples")
    assert part.label == "text (generated, partial: 12 of 75,000 examples)"


def test_a_part_of_the_published_set_is_partial(folder: Path) -> None:
    found = open_store(folder).manifest
    assert found.partial == "12 of 75,000 examples" and found.label != "text"


def test_samples_and_unpublished_tasks_are_not_partial(tmp_path: Path) -> None:
    for name, changes in (("a", {"is_sample": True}), ("b", {"task": "pathfinder16-cl3-d1"})):
        write_store(tmp_path / name, manifest(**changes), fill)
        assert open_store(tmp_path / name).manifest.partial == ""


@pytest.mark.parametrize("label", [0, 1])
def test_data_with_one_class_are_refused(tmp_path: Path, label: int) -> None:
    def same(writer: StoreWriter) -> None:
        for split in ("train", "dev", "test"):
            writer.add_rows(split, np.ones((7, 4), np.uint8), [label] * 7)

    with pytest.raises(DataError, match=rf"All 21 examples of text have label {label}; ") as error:
        write_store(tmp_path / "text", manifest(), same)
    one_sentence(error.value)
    assert not (tmp_path / "text").exists()


def test_pickled_store_and_split_are_small_and_reopen(folder: Path) -> None:
    store = open_store(folder)
    for thing in (store, store.split("test")):
        blob = pickle.dumps(thing)
        assert len(blob) < 500
    assert pickle.loads(pickle.dumps(store.split("test"))).tokens(0).tolist() == [5, 9, 1]


def test_equal_data_have_equal_checksums(folder: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "again" / "text", manifest(), fill)
    again = open_store(tmp_path / "again" / "text").manifest
    assert again.checksum == open_store(folder).manifest.checksum
    assert again.num_bytes == sum(
        f.stat().st_size for f in folder.iterdir() if f.name != "manifest.json"
    )


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [torn, emptied, one_bit, removed])
@pytest.mark.parametrize(
    "name", ["tokens.bin", "offsets.npy", "labels.npy", "test.index.npy", "manifest.json"]
)
def test_damage_is_detected_at_open(folder: Path, name: str, damage: object) -> None:
    damage(folder / name)  # type: ignore[operator]
    with pytest.raises(DataError, match=name) as caught:
        open_store(folder)
    assert "\n" not in str(caught.value)


def test_torn_file_says_how_many_bytes_there_are(folder: Path) -> None:
    torn(folder / "tokens.bin")
    with pytest.raises(DataError, match="has 39 bytes instead of 40"):
        open_store(folder)


def test_edit_of_one_byte_of_a_large_file_is_detected_whenever_its_time_moved(
    tmp_path: Path,
) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (6000, 1024), dtype=np.uint8)

    def fill_large(writer: StoreWriter) -> None:
        for split in ("train", "dev", "test"):
            writer.add_rows(
                split,
                rows if split == "train" else rows[:2],
                np.arange(6000)[: len(rows if split == "train" else rows[:2])] % 2,
            )

    folder = tmp_path / "image"
    write_store(folder, manifest(dtype="uint8", max_length=1024), fill_large)
    path = folder / "tokens.bin"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(6000)  # between the sampled blocks, which start at 0 and at about 98,000
        byte = file.read(1)[0]
        file.seek(6000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"tokens\.bin has another content"):
        open_store(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a forger who resets the time
    open_store(folder)
    with pytest.raises(DataError, match=r"tokens\.bin has another content"):
        open_store(folder, verify=True)


def test_a_copy_with_new_times_is_checked_once_and_accepted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, ns=(1, 1))
    assert open_store(tmp_path / "copy").split("train").tokens(3).tolist() == [7]
    noted = json.loads((tmp_path / "copy" / "verified.json").read_bytes())
    assert noted["tokens.bin"] == 1
    (tmp_path / "copy" / "verified.json").write_text("[torn")
    open_store(tmp_path / "copy")


def test_other_format_versions_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(
        DataError, match=r"format 1, but .*prepare the data again \(python -m dmx\.data text\)"
    ):
        open_store(folder)


def test_edited_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"num_classes": 2', '"num_classes": 5'))
    with pytest.raises(DataError, match="was edited"):
        open_store(folder)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_nothing_remains_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    def broken(writer: StoreWriter) -> None:
        fill(writer)
        raise error

    with pytest.raises(type(error)):
        write_store(tmp_path / "text", manifest(), broken)
    assert [p.name for p in tmp_path.iterdir()] == [".text.lock"]


def test_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_writer, "fsync_tree", full)
    with pytest.raises(DataError, match="the disk is full"):
        write_store(tmp_path / "text", manifest(), fill)
    assert not (tmp_path / "text").exists()


def test_root_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("x")
    with pytest.raises(DataError, match=r"Cannot create .*root"):
        write_store(tmp_path / "root" / "text", manifest(), fill)


@pytest.mark.parametrize(
    ("ids", "label", "message"),
    [
        ([511], 0, "ids 511..511"),
        ([-1], 0, "ids -1..-1"),
        ([1], 2, "label 2"),
        ([1], -1, "label -1"),
        ([1] * 17, 0, "17 tokens"),
    ],
)
def test_impossible_examples_are_refused(
    tmp_path: Path, ids: list[int], label: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_store(tmp_path / "text", manifest(), lambda writer: writer.add("train", ids, label))
    assert not (tmp_path / "text").exists()


def test_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split dev, test"):
        write_store(tmp_path / "text", manifest(), lambda writer: writer.add("train", [1], 0))
    assert not (tmp_path / "text").exists()


def test_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="no prepared data set"):
        write_store(tmp_path / "text", manifest(), fill)
    assert (tmp_path / "text" / "thesis.tex").read_text() == "mine"


def test_replace_swaps_the_old_store(folder: Path) -> None:
    def other(writer: StoreWriter) -> None:
        for split in ("train", "dev", "test"):
            writer.add(split, [9], 0)
        writer.add("train", [9], 1)

    write_store(folder, manifest(), other)  # refused silently: it is prepared already
    assert len(open_store(folder).split("train")) == 4
    write_store(folder, manifest(), other, replace_existing=True)
    assert len(open_store(folder).split("train")) == 2
    assert sorted(p.name for p in folder.parent.iterdir()) == [".text.lock", "text"]


def test_debris_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".text.partial-1").mkdir()
    (tmp_path / ".text.partial-1" / "tokens.bin").write_bytes(b"half")
    write_store(tmp_path / "text", manifest(), fill)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".text.lock", "text"]


def _prepare(folder: Path, barrier: object, counts: object) -> None:
    def counted(writer: StoreWriter) -> None:
        with counts.get_lock():  # type: ignore[attr-defined]
            counts.value += 1  # type: ignore[attr-defined]
        fill(writer)

    barrier.wait()  # type: ignore[attr-defined]
    write_store(folder, manifest(), counted)
    assert open_store(folder).split("train").tokens(3).tolist() == [7]


def test_concurrent_preparers_write_once_and_all_succeed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, counts = context.Barrier(4), context.Value("i", 0)
    workers = [
        context.Process(target=_prepare, args=(tmp_path / "text", barrier, counts))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert counts.value == 1
