"""Pathfinder folders: metadata order, the reference's split, empty images, and broken sources."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmx.data.prepare import prepare_data
from dmx.data.readers.pathfinder import pathfinder_split
from dmx.errors import DataError
from tests.data.helpers import png, write_folder, write_tar, write_zip
from tests.tiny import one_sentence

LEVEL = "lra_release/lra_release/pathfinder32/curv_contour_length_14"
TASK = "pathfinder32-curv_contour_length_14"


def pixels(number: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)


def line(batch: int, number: int, label: int) -> str:
    return f"imgs/{batch} sample_{number}.png {number} {label} 1.0 6 2 2 0.5 1 1\n"


def release(per_batch: int = 6) -> dict[str, bytes]:
    """Batches 0, 2 and 10, whose names sort otherwise as text; image n of batch b is b*100 + n."""
    files: dict[str, bytes] = {}
    for batch in (0, 2, 10):
        numbers = range(per_batch)
        for n in numbers:
            files[f"{LEVEL}/imgs/{batch}/sample_{n}.png"] = png(pixels(batch * 100 + n))
        text = "".join(line(batch, n, (batch + n) % 2) for n in numbers)
        files[f"{LEVEL}/metadata/{batch}.npy"] = text.encode()
    return files


def expected_split(count: int) -> dict[str, list[int]]:
    order = list(range(count))
    random.Random(2222).shuffle(order)
    a, b = int(0.8 * count), int(0.9 * count)
    return {"train": order[:a], "dev": order[a:b], "test": order[b:]}


@pytest.mark.parametrize("archive", [False, True])
def test_release_is_read_in_numeric_order_and_split(tmp_path: Path, archive: bool) -> None:
    raw = release()
    write = write_tar if archive else write_folder
    store = prepare_data(TASK, tmp_path / "data", source=write(tmp_path / "raw", raw))
    listed = [(batch, n) for batch in (0, 2, 10) for n in range(6)]
    for split, numbers in expected_split(18).items():
        got = store.split(split)
        assert len(got) == len(numbers)
        for place, number in enumerate(numbers):
            batch, n = listed[number]
            assert got.labels[place] == (batch + n) % 2
            assert (got.tokens(place) == pixels(batch * 100 + n).reshape(-1)).all()
    assert store.manifest.parameters["skipped_empty_images"] == 0
    assert store.manifest.label == f"{TASK} (partial: 18 of 200,000 examples)"


@pytest.mark.parametrize("up", range(5))
def test_source_may_be_any_level(tmp_path: Path, up: int) -> None:
    write_folder(tmp_path / "raw", release())
    store = prepare_data(
        TASK, tmp_path / "data", source=(tmp_path / "raw" / LEVEL / "x").parents[up]
    )
    assert sum(store.manifest.splits.values()) == 18
    with pytest.raises(DataError, match="no data for pathfinder64"):
        source = tmp_path / "raw" / LEVEL  # right level, wrong resolution
        prepare_data("pathfinder64-curv_contour_length_14", tmp_path / "data", source=source)


def test_split_facts_of_the_reference() -> None:
    ten = pathfinder_split(10)
    assert [ten[s].tolist() for s in ("train", "dev", "test")] == [
        [6, 8, 9, 0, 2, 5, 7, 1], [4], [3],
    ]  # fmt: skip
    full = pathfinder_split(200_000)
    assert full["train"][:6].tolist() == [128683, 41692, 89114, 134985, 79735, 156922]
    assert full["dev"][:3].tolist() == [140193, 21980, 91806]
    assert full["test"][:3].tolist() == [81232, 179446, 2767]
    joined = ",".join(str(n) for s in ("train", "dev", "test") for n in full[s].tolist())
    assert hashlib.sha256(joined.encode()).hexdigest().startswith("d34af41bd7233085")
    one_less = pathfinder_split(199_999)
    assert [len(one_less[s]) for s in ("train", "dev", "test")] == [159_999, 20_000, 20_000]
    with pytest.raises(DataError, match="9 images are too few"):
        pathfinder_split(9)


@pytest.mark.parametrize("archive", [False, True])
def test_the_published_empty_image_is_skipped_and_counted(
    tmp_path: Path, archive: bool, caplog: pytest.LogCaptureFixture
) -> None:
    baseline = "curv_baseline"
    raw = release() | {f"{LEVEL}/imgs/2/sample_3.png": b""}
    raw = {name.replace("curv_contour_length_14", baseline): raw[name] for name in raw}
    write = write_tar if archive else write_folder
    source = write(tmp_path / "raw", raw)
    with caplog.at_level("WARNING", logger="dmx"):
        store = prepare_data(f"pathfinder32-{baseline}", tmp_path / "data", source=source)
    assert sum(store.manifest.splits.values()) == 17
    assert store.manifest.parameters["skipped_empty_images"] == 1
    assert "1 empty image file(s) left out" in caplog.text
    listed = [(b, n) for b in (0, 2, 10) for n in range(6) if (b, n) != (2, 3)]
    batch, n = listed[expected_split(17)["train"][0]]
    assert (store.split("train").tokens(0) == pixels(batch * 100 + n).reshape(-1)).all()


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    ("level", "empty", "words"),
    [
        (
            "curv_contour_length_14",
            1,
            "1 of 18 image files are empty, imgs/2/sample_0.png the firs",
        ),
        ("curv_contour_length_14", 6, "6 of 18 image files are empty"),
        ("curv_baseline", 2, "2 of 18 image files are empty.*, and 1 in the published set"),
    ],
)
def test_more_empty_images_are_a_broken_copy(
    tmp_path: Path, level: str, empty: int, words: str, archive: bool
) -> None:
    raw = release() | {f"{LEVEL}/imgs/2/sample_{n}.png": b"" for n in range(empty)}
    raw = {name.replace("curv_contour_length_14", level): raw[name] for name in raw}
    source = (write_tar if archive else write_folder)(tmp_path / "raw", raw)
    with pytest.raises(DataError, match=words) as caught:
        prepare_data(f"pathfinder32-{level}", tmp_path / "data", source=source)
    one_sentence(caught.value)
    assert not (tmp_path / "data" / f"pathfinder32-{level}").exists()


@pytest.mark.parametrize("archive", [False, True])
def test_images_that_no_metadata_list_are_told(
    tmp_path: Path, archive: bool, caplog: pytest.LogCaptureFixture
) -> None:
    raw = {name: c for name, c in release().items() if not name.endswith("metadata/2.npy")}
    source = (write_tar if archive else write_folder)(tmp_path / "raw", raw)
    with caplog.at_level("WARNING", logger="dmx"):
        store = prepare_data(TASK, tmp_path / "data", source=source)
    assert "no metadata file lists the images in imgs/2; they are left out" in caplog.text
    assert store.manifest.partial == "12 of 200,000 examples"


def twelve(text: bytes) -> bytes:
    return text.replace(b" 0.5 1 1\n", b" 0.5 1 1 20\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b" \n"),
        lambda text: text.replace(b" ", b"  "),
        lambda text: text.replace(b" ", b"\t"),
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text + b"\n \n",
        lambda text: text.removesuffix(b"\n"),
        lambda text: text.replace(b" 1 1.0", b" 1.0 1.0").replace(b" 0 1.0", b" 0.0 1.0"),
        lambda text: text.replace(b"imgs/2", b"imgs\\2"),
        twelve,
    ],
)
def test_metadata_of_other_systems_are_read_the_same(tmp_path: Path, change: Any) -> None:
    raw = release()
    wanted = prepare_data(TASK, tmp_path / "data", source=write_folder(tmp_path / "raw", raw))
    raw |= {n: change(c) for n, c in raw.items() if n.endswith("metadata/2.npy")}
    raw |= {f"{LEVEL}/metadata/._2.npy": b"\0\5\x16\7\xb0", f"{LEVEL}/metadata/.DS_Store": b"\0"}
    for write in (write_folder, write_tar, write_zip):
        path = tmp_path / write.__name__
        store = prepare_data(TASK, path / "data", source=write(tmp_path / f"{path.name}.raw", raw))
        assert store.manifest.checksum == wanted.manifest.checksum


def test_original_generators_folder_with_real_npy(tmp_path: Path) -> None:
    rows = []
    files = {}
    for n in range(10):
        files[f"cl14_alpha0.75/imgs/0/sample_{n}.png"] = png(pixels(n, 128))
        rows.append(["imgs/0", f"sample_{n}.png", n, n % 2, 1.8, 14, 4, 5, 1.5, 2, 1])
    buffer = io.BytesIO()
    np.save(buffer, np.array([[str(c) for c in row] for row in rows], dtype="S17"))
    files["cl14_alpha0.75/metadata/0.npy"] = buffer.getvalue()
    files["cl14_alpha0.75/metadata/0_bkp.npy"] = b"garbage"
    root = write_folder(tmp_path / "generation", files)
    for source in (tmp_path, root, root / "cl14_alpha0.75"):
        store = prepare_data("pathX-cl14_alpha0.75", tmp_path / "data", source=source, force=True)
        assert store.split("train").labels.tolist() == [0, 0, 1, 0, 0, 1, 1, 1]  # 6 8 9 0 2 5 7 1
        assert (store.split("dev").tokens(0) == pixels(4, 128).reshape(-1)).all()
        assert store.manifest.data_name == "original-pathx"
    with pytest.raises(DataError, match="no data for pathX-cl14_nogap"):
        prepare_data("pathX-cl14_nogap", tmp_path / "data", source=root / "cl14_alpha0.75")


def rgb(_: bytes) -> bytes:
    return png(np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("imgs/2/sample_1.png", lambda c: c[:-20], "no readable PNG"),
        ("imgs/2/sample_1.png", lambda c: c[:40], "no readable PNG"),
        ("imgs/2/sample_1.png", lambda c: c[:300] + b"!" + c[301:], "no readable PNG"),
        ("imgs/2/sample_1.png", lambda c: b"GIF89a" + c, "no readable PNG"),
        ("imgs/2/sample_1.png", rgb, "mode RGB"),
        ("imgs/2/sample_1.png", lambda _: png(np.zeros((64, 64), np.uint8)), "64 x 64 in mode L"),
        ("imgs/2/sample_1.png", lambda _: None, "missing"),
        ("metadata/2.npy", lambda c: c + b"imgs/2 sample_0.png 0\n", "line 7: 3 fields"),
        ("metadata/2.npy", lambda c: c[:-8], "line 6: "),
        ("metadata/2.npy", lambda c: c.replace(b" 1 1.0 ", b" 7 1.0 ", 1), "line 2: label '7'"),
        ("metadata/2.npy", lambda c: c.replace(b"imgs/2", b"../..", 1), "unsafe path"),
        ("metadata/2.npy", lambda c: b"\xff" + c, "no readable metadata"),
        ("metadata/2.npy", lambda c: c + line(2, 0, 0).encode(), "lists an image twice"),
        ("metadata/2.npy", lambda _: b"\x93NUMPY\x01\x00", "no readable metadata"),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_broken_sources_name_the_file(
    tmp_path: Path, name: str, change: object, message: str, archive: bool
) -> None:
    raw = release()
    content = change(raw.pop(f"{LEVEL}/{name}"))  # type: ignore[operator]
    if content is not None:
        raw[f"{LEVEL}/{name}"] = content
    write = write_tar if archive else write_folder
    with pytest.raises(DataError, match=message) as caught:
        prepare_data(TASK, tmp_path / "data", source=write(tmp_path / "raw", raw))
    assert name.split("/")[-1].split(".")[0] in str(caught.value) or "twice" in message
    assert not (tmp_path / "data" / TASK).exists()


def test_pickled_metadata_is_never_loaded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([["imgs/0", object()]], dtype=object), allow_pickle=True)
    raw = release() | {f"{LEVEL}/metadata/2.npy": buffer.getvalue()}
    with pytest.raises(DataError, match="no readable metadata"):
        prepare_data(TASK, tmp_path / "data", source=write_folder(tmp_path / "raw", raw))


def test_no_metadata(tmp_path: Path) -> None:
    raw = {n: c for n, c in release().items() if "metadata" not in n}
    raw[f"{LEVEL}/metadata/readme.txt"] = b""
    with pytest.raises(DataError, match="has no metadata files"):
        prepare_data(TASK, tmp_path / "data", source=write_folder(tmp_path / "raw", raw))
