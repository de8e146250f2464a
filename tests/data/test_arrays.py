"""Arrays of ids are read as they are; pickles are converted without running anything in them."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmx.data.prepare import prepare_data
from dmx.data.store import Store
from dmx.errors import DataError
from dmx.tasks import SPLITS
from scripts.convert_pickles import PickledArray, load_pickle
from scripts.convert_pickles import main as convert
from tests.data.helpers import write_tar


def write(folder: Path, task: str, splits: dict[str, list[dict[str, Any]]], protocol: int) -> Path:
    folder.mkdir(exist_ok=True)
    for split, examples in splits.items():
        content = pickle.dumps(examples, protocol=protocol)
        (folder / f"{task}.{split}.pickle").write_bytes(content)
    return folder


def read(task: str, pickles: Path, root: Path) -> Store:
    """The store of a folder of pickles, by way of the script."""
    assert convert([str(pickles), str(root / "converted")]) == 0
    return prepare_data(task, root / "data", source=root / "converted")


def text_example(ids: list[int], label: int, length: int = 4096) -> dict[str, Any]:
    padded = np.array(ids + [0] * (length - len(ids)), np.int32)
    return {"input_ids_0": padded, "label": label}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_text_pickles_keep_order_and_lose_padding(tmp_path: Path, protocol: int) -> None:
    splits = {
        "train": [text_example([5, 6, 7], 1), text_example([256], 0), text_example([9] * 4000, 1)],
        "dev": [text_example([1, 2], 0)],
        "test": [text_example([3], 1)],
    }
    source = write(tmp_path / "old", "text", splits, protocol)
    store = read("text", source, tmp_path)
    train = store.split("train")
    assert [train.tokens(k).tolist() for k in range(2)] == [[5, 6, 7], [256]]
    assert train.lengths.tolist() == [3, 1, 4000]
    assert train.labels.tolist() == [1, 0, 1]
    assert store.split("dev").tokens(0).tolist() == [1, 2]
    assert store.manifest.data_name == "reference-text"
    for k, example in enumerate(splits["train"]):
        assert (train.gather([k], 4096)[0] == example["input_ids_0"]).all()


@pytest.mark.parametrize("prefix", ["", "lra-"])
@pytest.mark.parametrize("label", [int, np.int32, np.array])
@pytest.mark.parametrize("ids", [list, np.asarray])
def test_lists_scalars_and_prefixed_names_mean_the_same(
    tmp_path: Path, ids: Any, label: Any, prefix: str
) -> None:
    rows = [[5, 6, 7], [256]]
    examples = [
        {"input_ids_0": ids(row + [0] * (4096 - len(row))), "label": label(n)}
        for n, row in enumerate(rows)
    ]
    source = write(tmp_path / "old", f"{prefix}text", dict.fromkeys(SPLITS, examples), 4)
    store = read("text", source, tmp_path)
    for split in SPLITS:
        found = store.split(split)
        assert [found.tokens(n).tolist() for n in range(2)] == rows
        assert found.labels.tolist() == [0, 1]


def test_image_pickles_keep_black_pixels(tmp_path: Path) -> None:
    pixels = np.zeros(1024, np.int32)
    pixels[3] = 255
    example = {"input_ids_0": pixels, "label": np.int64(7)}
    splits = {split: [example] for split in SPLITS} | {"train": [example | {"label": 0}]}
    source = write(tmp_path / "old", "image", splits, 4)
    store = read("image", source, tmp_path)
    assert store.split("test").tokens(0).tolist() == pixels.tolist()
    assert store.split("test").labels.tolist() == [7]
    assert store.manifest.dtype == "uint8"


def test_paired_pickles(tmp_path: Path) -> None:
    example = text_example([4], 1) | {"input_ids_1": np.array([8, 9] + [0] * 4094, np.int32)}
    splits = {split: [example] for split in SPLITS} | {"test": [example | {"label": 0}]}
    source = write(tmp_path / "old", "retrieval", splits, 4)
    split = read("retrieval", source, tmp_path).split("dev")
    assert (split.tokens(0).tolist(), split.tokens(0, 1).tolist()) == ([4], [8, 9])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids_0": np.zeros(4095, np.int32), "label": 1}, "has 4095 values, and others 4096"),
        ({"input_ids_0": np.zeros(4096, np.float32), "label": 1}, "float32"),
        ({"input_ids_0": [1, 0.5], "label": 1}, "no list of numbers"),
        ({"input_ids_0": [1, 1 << 70], "label": 1}, "no list of numbers"),
        ({"input_ids_0": np.full(4096, -1, np.int32), "label": 1}, "no token ids"),
        ({"input_ids_0": np.ones(4096, np.int32), "label": np.array([1])}, "whole number"),
        ({"input_ids_0": np.ones(4096, np.int32), "label": np.array(0.5)}, "whole number"),
        ({"label": 1}, "no list of numbers"),
        ({"input_ids_0": np.ones(4096, np.int32), "label": 0.5}, "whole number"),
        (3, "no list of numbers"),
    ],
)
def test_bad_examples_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], example: Any, message: str
) -> None:
    good = text_example([1], 0)
    splits = {"train": [good, example], "dev": [good], "test": [good]}
    source = write(tmp_path / "old", "text", splits, 4)
    assert convert([str(source), str(tmp_path / "new")]) == 2
    told = capsys.readouterr().err
    assert message in told and "example 1" in told and len(told.splitlines()) == 1


def save(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    ids = np.ones((3, 4096), np.uint16)
    arrays = {"input_ids_0": ids, "label": np.array([0, 1, 0])}
    for split in SPLITS:
        np.savez(folder / f"text.{split}.npz", **(arrays | (changes if split == "dev" else {})))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids_0": np.ones((3, 4000), np.int32)}, "4000.* instead of .*4096"),
        ({"input_ids_0": np.ones((2, 4096), np.int32)}, "instead of .*3, 4096"),
        ({"input_ids_0": np.ones((3, 4096), np.float32)}, "float32"),
        ({"input_ids_0": np.array([{}], object)}, "no readable npz"),
        (
            {"input_ids_0": np.eye(3, 4096, dtype=int)[::-1] * [[1], [0], [1]]},
            "example 1, .*padding",
        ),
        ({"input_ids_0": np.full((3, 4096), 600)}, "600"),
        ({"label": np.array([0, 1])}, "instead of .*2, 4096"),
        ({"label": np.array([0, 1, 2])}, "label 2"),
        ({"label": np.array([0, 1, 0.5])}, "whole numbers"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_data("text", tmp_path / "data", source=save(tmp_path / "raw", **changes))
    assert not (tmp_path / "data" / "text").exists()


def test_arrays_come_from_an_archive_and_torn_ones_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "raw")
    raw = {path.name: path.read_bytes() for path in folder.iterdir()}
    store = prepare_data("text", tmp_path / "a", source=write_tar(tmp_path / "a.tgz", raw))
    assert store.split("dev").labels.tolist() == [0, 1, 0]
    raw["text.dev.npz"] = raw["text.dev.npz"][:-30]
    with pytest.raises(DataError, match=r"text\.dev\.npz is no readable npz"):
        prepare_data("text", tmp_path / "b", source=write_tar(tmp_path / "b.tgz", raw))
    with pytest.raises(DataError, match=r"text\.test\.npz is missing"):
        (folder / "text.test.npz").unlink()
        prepare_data("text", tmp_path / "b", source=folder)


def test_what_a_header_announces_is_not_reserved(tmp_path: Path) -> None:
    folder = save(tmp_path / "raw")
    with np.load(folder / "text.dev.npz") as archive:
        ids = archive["input_ids_0"]
    header = io.BytesIO()
    shape = {"descr": "<i8", "fortran_order": False, "shape": (10**15,)}
    np.lib.format.write_array_header_1_0(header, shape)
    np.savez(folder / "text.dev.npz", input_ids_0=ids)
    with zipfile.ZipFile(folder / "text.dev.npz", "a") as archive:
        archive.writestr("label.npy", header.getvalue())
    with pytest.raises(DataError, match=r"text\.dev\.npz .*an array of 8 PB is announced, but"):
        prepare_data("text", tmp_path / "data", source=folder)


def test_a_pickle_is_refused_with_the_script_that_converts_it(tmp_path: Path) -> None:
    good = text_example([1], 0)
    source = write(tmp_path / "old", "text", {split: [good] for split in SPLITS}, 4)
    with pytest.raises(DataError, match=r"holds pickles .*scripts/convert_pickles\.py .*old OUT"):
        prepare_data("text", tmp_path / "data", source=source)
    assert not (tmp_path / "data").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch PWNED",)


class EvilBuild:
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (np.ndarray, "tofile")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("evil", [Evil(), EvilBuild(), {"label": Evil()}, np.array([Evil()], "O")])
def test_nothing_in_a_pickle_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: object, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not allowed"):
        load_pickle(io.BytesIO(pickle.dumps(evil, protocol=protocol)), "evil.pickle")
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([1, 2, 3])[:-3],
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",  # ends as a bare dtype: harmless, but not asked for
        b"(lp0\nI1\naI2\na",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    ],
)
def test_torn_pickles_are_one_sentence(content: bytes) -> None:
    try:
        value = load_pickle(io.BytesIO(content), "torn.pickle")
    except DataError as error:
        assert "torn.pickle" in str(error)
        assert "\n" not in str(error)
    else:
        assert not isinstance(value, list | dict | PickledArray)


@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i4", "<f8", "S3", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_come_through_exactly(dtype: str, order: Any, protocol: int) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3).astype(dtype), order=order)
    value = load_pickle(io.BytesIO(pickle.dumps(array, protocol=protocol)), "x")
    assert isinstance(value, PickledArray)
    assert value.value.shape == (2, 3)
    assert (value.value == array).all()


def test_lying_shape_is_refused() -> None:
    content = pickle.dumps(np.arange(6, dtype=np.uint8), protocol=2)
    assert content.count(b"K\x06\x85") == 1
    with pytest.raises(DataError, match="6 values for the shape"):
        load_pickle(io.BytesIO(content.replace(b"K\x06\x85", b"K\x07\x85")), "x")
