"""Byte-level tasks from hand-made sources: ids, splits, TFDS order, pairs, and bad lines."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from dmx.data.prepare import prepare_data
from dmx.data.readers import archives as text_reader
from dmx.errors import DataError
from tests.data.helpers import write_folder, write_tar

REVIEWS = {
    "aclImdb/train/neg/0_3.txt": b"  Bad.<br />Really bad. \n",
    "aclImdb/train/neg/1_1.txt": "Caf\u00e9 noir".encode(),
    "aclImdb/train/pos/0_9.txt": b"x" * 5000,
    "aclImdb/train/pos/1_7.txt": b"\xf0\x9f\x99\x82 good",
    "aclImdb/train/unsup/0_0.txt": b"ignored",
    "aclImdb/train/pos/urls_pos.txt": b"ignored",
    "aclImdb/test/neg/0_2.txt": b"meh",
    "aclImdb/test/neg/1_2.txt": b"no",
    "aclImdb/test/pos/0_10.txt": b"yes",
    "aclImdb/test/pos/1_10.txt": b"YES",
    "aclImdb/README": b"ignored",
}


@pytest.fixture(autouse=True)
def small_imdb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_reader, "PER_CLASS", 2)


@pytest.mark.parametrize("archive", [False, True])
def test_imdb_becomes_byte_ids_in_tfds_order(tmp_path: Path, archive: bool) -> None:
    if archive:
        source = write_tar(tmp_path / "aclImdb_v1.tar.gz", dict(reversed(REVIEWS.items())))
    else:
        source = write_folder(tmp_path / "raw", REVIEWS) / "aclImdb"
    store = prepare_data("text", tmp_path / "data", source=source)
    train = store.split("train")
    paths = [
        f"aclImdb/train/{c}/{n}"
        for c, n in (("neg", "0_3.txt"), ("neg", "1_1.txt"), ("pos", "0_9.txt"), ("pos", "1_7.txt"))
    ]
    paths.sort(key=lambda p: int(hashlib.md5(f"train{p}".encode()).hexdigest(), 16))
    assert train.labels.tolist() == [int("/pos/" in p) for p in paths]
    for k, path in enumerate(paths):
        assert train.tokens(k).tolist() == [b + 1 for b in REVIEWS[path].strip()][:4000]
    ids = train.tokens(paths.index("aclImdb/train/neg/0_3.txt"))
    assert ids[:6].tolist() == [67, 98, 101, 47, 61, 99]  # "Bad.<b", <br /> is kept
    assert len(train.tokens(paths.index("aclImdb/train/neg/1_1.txt"))) == 10  # bytes, not letters
    assert train.tokens(paths.index("aclImdb/train/pos/1_7.txt"))[0] == 0xF1
    assert train.lengths.max() == 4000
    assert dict(store.manifest.splits) == {"train": 4, "dev": 4, "test": 4}
    files = store.manifest.files
    assert files["dev.index.npy"].sha256 == files["test.index.npy"].sha256
    assert store.split("dev").labels.tolist() == store.split("test").labels.tolist()
    assert (store.manifest.max_length, store.manifest.data_name) == (4096, "lra-text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aclImdb/train/neg/1_1.txt": b"\xff"}, r"1_1\.txt is not UTF-8"),
        ({"aclImdb/train/neg/1_1.txt": b" \n"}, r"1_1\.txt is empty"),
        ({"aclImdb/train/neg/2_1.txt": b"third"}, "5 reviews for train instead of 4"),
        ({"aclImdb/test/pos/0_10.txt": None, "aclImdb/test/pos/1_10.txt": None}, "no reviews"),
        ({"aclImdb/test/pos/0_10.txt": None}, "3 reviews for test instead of 4"),
    ],
)
def test_broken_imdb_is_refused(
    tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    raw = {name: content for name, content in (REVIEWS | change).items() if content is not None}
    with pytest.raises(DataError, match=message):
        prepare_data("text", tmp_path / "data", source=write_tar(tmp_path / "x.tar.gz", raw))
    assert not (tmp_path / "data" / "text").exists()


def test_wrong_archive_says_what_was_looked_for(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "cifar.tar.gz", {"cifar-10-batches-py/data_batch_1": b""})
    with pytest.raises(DataError, match=r"no data for text\. Looked for: .*aclImdb/"):
        prepare_data("text", tmp_path / "data", source=source)


def pair(label: str, first: bytes, second: bytes) -> bytes:
    return b"\t".join([label.encode(), b"P11-1001", b"W05-0101", first, second]) + b"\n"


QUOTED = rb"""b'He said "no".\n\xc3\xa9'"""


def aan(train: bytes) -> dict[str, bytes]:
    folder = "lra_release/lra_release/tsv_data/new_aan_pairs"
    return {
        f"{folder}.train.tsv": train,
        f"{folder}.eval.tsv": pair("0.0", b"b'a'", b'b"b"'),
        f"{folder}.test.tsv": pair("1.0", b"b'c'", b"b'd'"),
    }


@pytest.mark.parametrize("archive", [False, True])
def test_aan_pairs_become_ids_of_the_repr(tmp_path: Path, archive: bool) -> None:
    raw = aan(pair("1.0", QUOTED, b"b'" + b"y" * 12000 + b"'") + pair("0.0", b'"open', b"b'z'"))
    source = (
        write_tar(tmp_path / "lra_release.gz", raw)
        if archive
        else write_folder(tmp_path / "r", raw)
    )
    store = prepare_data("retrieval", tmp_path / "data", source=source)
    train = store.split("train")
    assert train.labels.tolist() == [1, 0]
    assert train.tokens(0).tolist() == [b + 1 for b in QUOTED]
    assert bytes(int(i) - 1 for i in train.tokens(0)).startswith(b'b\'He said "no".\\n\\xc3')
    assert len(train.tokens(0, 1)) == 4000
    assert train.tokens(1).tolist() == [b + 1 for b in b'"open']  # no quoting is processed
    assert store.split("dev").labels.tolist() == [0]
    assert store.split("test").tokens(0, 1).tolist() == [b + 1 for b in b"b'd'"]
    assert store.manifest.paired


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: b"label\tid_1\tid_2\ttext_1\ttext_2\n" + text,
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text + b"\n\r\n",
        lambda text: text.removesuffix(b"\n"),
        lambda text: text.replace(b".0\t", b"\t"),
    ],
)
def test_pairs_of_other_systems_are_read_the_same(tmp_path: Path, change: Any) -> None:
    train = pair("1.0", b"b'a'", b"b'b'") + pair("0.0", b'b"c"', b"b'd'")
    source = write_folder(tmp_path / "raw", aan(change(train)))
    store = prepare_data("retrieval", tmp_path / "data", source=source)
    split = store.split("train")
    assert split.labels.tolist() == [1, 0]
    # "b'a'" is 98 39 97 39 as bytes, and an id is one more.
    assert split.tokens(0).tolist() == [99, 40, 98, 40]
    assert split.tokens(1, 1).tolist() == [99, 40, 101, 40]
    assert store.manifest.partial == "4 of 182,613 examples"


def test_texts_that_are_no_reprs_are_not_the_published_ones(tmp_path: Path) -> None:
    raw = aan(pair("1.0", b"b'a'", b"plain"))
    store = prepare_data("retrieval", tmp_path / "data", source=write_folder(tmp_path / "raw", raw))
    assert store.manifest.partial == "3 of 182,613 examples; decoded texts"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1.0\ta\tb\tonly four\n", "line 2: 4 columns instead of 5"),
        (pair("1.0", b"a\tb", b"c"), "line 2: 6 columns"),
        (pair("2.0", b"a", b"b"), "line 2: label b'2.0'"),
        (pair("1.0", b"", b"b"), "line 2: an empty text"),
        (pair("1.0", b"\xff\xfe", b"b"), "line 2 is not UTF-8"),
        (b"1.0\ta\tb\n", "line 2: the ids of two papers and not their texts"),
        (b"label\ta\tb\tc\td\n", "line 2: label b'label'"),
    ],
)
def test_bad_pairs_name_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    raw = aan(pair("1.0", b"a", b"b") + line)
    with pytest.raises(DataError, match=message) as caught:
        prepare_data("retrieval", tmp_path / "data", source=write_folder(tmp_path / "raw", raw))
    assert "new_aan_pairs.train.tsv" in str(caught.value)
    assert not (tmp_path / "data" / "retrieval").exists()
