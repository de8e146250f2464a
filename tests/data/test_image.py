"""Image: TF's grey, TFDS's order, both CIFAR versions, and refusals of what is no CIFAR."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from dmx.data.prepare import prepare_data
from dmx.data.readers import archives as image
from dmx.data.readers.archives import tf_grey
from dmx.errors import DataError
from scripts import convert_pickles
from tests.data.helpers import write_folder, write_tar


@pytest.mark.parametrize(
    ("rgb", "grey"),
    [
        ((255, 0, 0), 76),
        ((0, 255, 0), 149),
        ((0, 0, 255), 29),
        ((128, 64, 32), 79),
        ((10, 200, 100), 132),
    ],
)
def test_grey_is_tensorflows(rgb: tuple[int, int, int], grey: int) -> None:
    planes = [np.full((2, 3), value, np.uint8) for value in rgb]
    assert (tf_grey(*planes) == grey).all()


def test_greys_stay_themselves() -> None:
    values = np.arange(256, dtype=np.uint8)
    assert (tf_grey(values, values, values) == values).all()


def test_order_is_that_of_tfds() -> None:
    order = image.tfds_order(50000)
    assert order[:6].tolist() == [16399, 1680, 47917, 17307, 27051, 48736]
    assert order[44998:45002].tolist() == [33703, 14541, 13431, 9237]
    assert order[-3:].tolist() == [5073, 39601, 32842]
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert digest == "b949abd3aa324e792be6dffe93e667040aa65a8c8870c2fe7e6cc9753238797a"


def batches(per_batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Six batches whose image k (counted through) has red k // 256 and green k % 256 everywhere."""
    made = []
    for batch in range(6):
        numbers = np.arange(batch * per_batch, (batch + 1) * per_batch)
        rgb = np.zeros((per_batch, 3, 1024), np.uint8)
        rgb[:, 0] = (numbers // 256)[:, None]
        rgb[:, 1] = (numbers % 256)[:, None]
        rgb[:, 2, 0] = 255  # the first pixel differs: rows and planes are not mixed up
        made.append((rgb.reshape(per_batch, 3072), (numbers % 10).astype(np.uint8)))
    return made


NAMES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def binary(data: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, bytes]:
    return {
        f"cifar-10-batches-bin/{name}.bin": np.hstack([labels[:, None], rgb]).tobytes()
        for name, (rgb, labels) in zip(NAMES, data, strict=True)
    }


def python3(data: list[tuple[np.ndarray, np.ndarray]], protocol: int) -> dict[str, bytes]:
    return {
        f"cifar-10-batches-py/{name}": pickle.dumps(
            {b"batch_label": b"x", b"labels": labels.tolist(), b"data": rgb, b"filenames": [b"a"]},
            protocol=protocol,
        )
        for name, (rgb, labels) in zip(NAMES, data, strict=True)
    }


def python2_pickle(rgb: np.ndarray, labels: np.ndarray) -> bytes:
    """What cPickle of Python 2 wrote, opcode by opcode: byte strings, numpy.core names."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = rgb.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b")
    array += b"\x87R(K\x01M" + rgb.shape[0].to_bytes(2, "little") + b"M"
    array += rgb.shape[1].to_bytes(2, "little") + b"\x86" + dtype + b"\x89"
    array += b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([x]) for x in labels.tolist()) + b"e"
    return b"\x80\x02}(" + short(b"data") + array + short(b"labels") + listed + b"u."


def python2(data: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, bytes]:
    return {
        f"cifar-10-batches-py/{name}": python2_pickle(rgb, labels)
        for name, (rgb, labels) in zip(NAMES, data, strict=True)
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    monkeypatch.setattr(image, "PER_BATCH", 20)
    monkeypatch.setattr(convert_pickles, "PER_BATCH", 20)
    monkeypatch.setattr(image, "NUM_TRAIN", 90)
    return batches(20)


@pytest.mark.parametrize("kind", ["binary", "python2", "python3-2", "python3-4", "python3-5"])
@pytest.mark.parametrize("archive", [False, True])
def test_all_versions_give_the_same_store(
    tmp_path: Path, small: list[tuple[np.ndarray, np.ndarray]], kind: str, archive: bool
) -> None:
    if kind == "binary":
        raw = binary(small)
    elif kind == "python2":
        raw = python2(small)
    else:
        raw = python3(small, int(kind[-1]))
    source = (
        write_tar(tmp_path / "c.tar.gz", raw) if archive else write_folder(tmp_path / "raw", raw)
    )
    if kind != "binary":
        with pytest.raises(
            DataError, match=r"binary version .* python scripts/convert_pickles\.py"
        ):
            prepare_data("image", tmp_path / "data", source=source)
        assert convert_pickles.main([str(source), str(tmp_path / "converted")]) == 0
        source = tmp_path / "converted"
    store = prepare_data("image", tmp_path / "data", source=source)
    assert dict(store.manifest.splits) == {"train": 90, "dev": 10, "test": 20}
    order = sorted(range(100), key=lambda k: hashlib.md5(f"train{k}".encode()).digest())
    for split, numbers in (
        ("train", order[:90]),
        ("dev", order[90:]),
        ("test", list(range(100, 120))),
    ):
        got = store.split(split)
        assert got.labels.tolist() == [k % 10 for k in numbers]
        for place, k in enumerate(numbers):
            # 0.587 of green alone; the first pixel has full blue on top.
            plain = int(np.float32(k) * np.float32(1 / 255) * np.float32(0.587) * np.float32(255.5))
            assert got.tokens(place)[1:].tolist() == [plain] * 1023
            assert abs(int(got.tokens(place)[0]) - plain - 29) <= 1
    assert store.manifest.dtype == "uint8"


@pytest.mark.slow
def test_full_size_split_is_45000_5000_10000(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "raw", binary(batches(10000)))
    store = prepare_data("image", tmp_path / "data", source=source / "cifar-10-batches-bin")
    assert dict(store.manifest.splits) == {"train": 45000, "dev": 5000, "test": 10000}
    assert store.split("train").labels[:4].tolist() == [9, 0, 7, 7]  # 16399, 1680, 47917, 17307
    assert store.split("dev").labels[0] == 1  # 13431
    red, green = 16399 // 256, 16399 % 256
    expected = tf_grey(*(np.array([v], np.uint8) for v in (red, green, 0)))[0]
    assert (store.split("train").tokens(0)[1:] == expected).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no readable pickle"),
        (pickle.dumps({b"data": np.zeros((20, 3072), np.uint8)}), "no data and labels"),
        (pickle.dumps({b"data": np.zeros((19, 3072), np.uint8), b"labels": [0] * 20}), "not CIFAR"),
        (pickle.dumps({b"data": np.zeros((20, 3072)), b"labels": [0] * 20}), "float64, not CIFAR"),
        (pickle.dumps({b"data": np.zeros((20, 3072), np.uint8), b"labels": [10] * 20}), "labels"),
        (pickle.dumps({b"data": np.zeros((20, 3072), np.uint8), b"labels": [0] * 9}), "labels"),
        (pickle.dumps([1, 2]), "no data and labels"),
    ],
)
def test_bad_python_batches_are_refused(
    tmp_path: Path,
    small: list[tuple[np.ndarray, np.ndarray]],
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    raw = python3(small, 4) | {"cifar-10-batches-py/data_batch_3": content}
    source = write_folder(tmp_path / "raw", raw)
    assert convert_pickles.main([str(source), str(tmp_path / "converted")]) == 2
    told = capsys.readouterr().err
    assert message in told and "data_batch_3" in told and len(told.splitlines()) == 1


def test_bad_binary_batches_are_refused(
    tmp_path: Path, small: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    raw = binary(small)
    name = "cifar-10-batches-bin/test_batch.bin"
    for content, message in ((raw[name][:-1], "truncated"), (b"\x0a" + raw[name][1:], "label 10")):
        source = write_folder(tmp_path / message.split()[0], raw | {name: content})
        with pytest.raises(DataError, match=message):
            prepare_data("image", tmp_path / "data", source=source)
    del raw[name]
    with pytest.raises(DataError, match=r"test_batch\.bin is missing"):
        prepare_data("image", tmp_path / "data", source=write_folder(tmp_path / "missing", raw))
