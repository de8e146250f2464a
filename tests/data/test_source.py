"""Sources: a folder and an archive answer alike; hostile and broken archives are refused."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import tarfile
from pathlib import Path

import pytest

from dmx.data import sources as source_module
from dmx.data.sources import open_source
from dmx.errors import DataError
from tests.data.helpers import write_folder, write_tar, write_zip
from tests.tiny import one_sentence

FILES = {
    "lra_release/listops-1000/a.tsv": b"outer",
    "lra_release/lra_release/listops-1000/a.tsv": b"inner",
    "lra_release/lra_release/b/c.bin": b"\0" * 5000,
}


@pytest.mark.parametrize("mode", ["folder", "zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_folder_and_archive_answer_alike(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x"
    if mode == "folder":
        write_folder(path, FILES)
    elif mode == "zip":
        write_zip(path, FILES)
    else:
        write_tar(path, {f"./{name}": content for name, content in FILES.items()}, mode)
    source = open_source(path)
    assert source.files("lra_release/lra_release/b") == ["c.bin"]
    assert source.folders("lra_release/lra_release") == ["b", "listops-1000"]
    assert source.files("nowhere") == []
    assert source.has("lra_release/listops-1000")
    assert source.has("lra_release/listops-1000/a.tsv")
    assert not source.has("listops-1000")
    assert not source.files("lra_release")
    assert source.size("lra_release/lra_release/b/c.bin") == 5000
    tails = ("lra_release/lra_release/listops-1000", "listops-1000")
    assert source.locate(tails, "a.tsv") == "lra_release/lra_release/listops-1000"
    assert source.locate(tails, "z.tsv") is None
    assert dict(source.read_small(FILES)) == FILES
    with pytest.raises(DataError, match=r"no/such\.file"):
        list(source.read_small(["no/such.file"]))
    with pytest.raises(DataError, match=r"no/such\.file"):
        source.size("no/such.file")


def test_archive_prefers_the_inner_copy_under_any_prefix(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.gz", {f"my/own/{n}": c for n, c in FILES.items()})
    found = open_source(path).locate(("listops-1000",), "a.tsv")
    assert found == "my/own/lra_release/lra_release/listops-1000"


def test_a_folder_is_searched_two_levels_deep_and_no_further(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"a/b/listops/t.tsv": b"", "c/listops/t.tsv": b"", "c/v.tsv": b""})
    locate = open_source(tmp_path / "x").locate
    assert locate(("listops",), "t.tsv") == "c/listops"
    assert locate(("", "listops"), "v.tsv") == "c"
    assert locate(("",), "t.tsv") == "c/listops"
    assert open_source(tmp_path / "x" / "a").locate(("listops",), "t.tsv") == "b/listops"
    assert open_source(tmp_path).locate(("listops",), "t.tsv") == "x/c/listops"
    (tmp_path / "y").mkdir()
    (tmp_path / "x").rename(tmp_path / "y" / "x")
    assert open_source(tmp_path).locate(("listops",), "t.tsv") is None


def test_two_copies_in_a_folder_are_named_and_not_chosen_from(tmp_path: Path) -> None:
    write_folder(tmp_path, {"new/t.tsv": b"new", "old/t.tsv": b"old"})
    with pytest.raises(DataError, match="more than once, in new and in old; give one") as caught:
        open_source(tmp_path).locate(("",), "t.tsv")
    one_sentence(caught.value)
    (tmp_path / "t.tsv").write_bytes(b"")
    assert open_source(tmp_path).locate(("",), "t.tsv") == ""


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_hidden_files_are_left_out(tmp_path: Path, kind: str) -> None:
    raw = {"m/0.npy": b"0", "m/._0.npy": b"\0\5\x16\7", "m/.DS_Store": b"", ".git/m/0.npy": b"1"}
    if kind != "folder":
        raw |= {"__MACOSX/deeper/m/._0.npy": b"", "__MACOSX/deeper/m/0.npy": b""}
    write = {"folder": write_folder, "tar": write_tar, "zip": write_zip}[kind]
    source = open_source(write(tmp_path / "x", raw))
    assert source.files("m") == ["0.npy"] and source.folders("") == ["m"]
    assert source.locate(("m",), "0.npy") == "m"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/passwd", "C:/x", "a\\..\\..\\b"])
def test_path_traversal_is_refused(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"fine": b"", name: b"evil"}, "w")
    with pytest.raises(DataError, match="unsafe path"):
        open_source(path).has("fine")
    with pytest.raises(DataError, match="unsafe path"):
        open_source(write_zip(tmp_path / "x.zip", {"fine": b"", name: b"evil"})).has("fine")


def test_links_are_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"link{kind!r}")
            info.type, info.linkname = kind, str(tmp_path / "secret")
            archive.addfile(info)
        info = tarfile.TarInfo("real")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"ok"))
    source = open_source(tmp_path / "x.tar")
    assert source.files("") == ["real"]
    assert dict(source.read_small(["real"])) == {"real": b"ok"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
def test_truncated_archive_is_one_sentence(tmp_path: Path, mode: str, keep: float) -> None:
    content = write_tar(tmp_path / "x", {"f": bytes(range(256)) * 400}, mode).read_bytes()
    cut = int(keep * len(content)) if isinstance(keep, float) else keep
    (tmp_path / "x").write_bytes(content[:cut])
    with pytest.raises(DataError, match="truncated") as caught:
        dict(open_source(tmp_path / "x").read_small(["f"]))
    assert "\n" not in str(caught.value)


XML = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>AccessDenied</Code></Error>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "or no archive"),
        (gzip.compress(b"no tar inside"), "or no archive"),
        (b"PK\3\4" + b"\0" * 2000, "truncated or damaged"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(60), "a 7-Zip archive, .* unpack it and give the folder"),
        (b"Rar!\x1a\7\1\0" + bytes(60), "a RAR archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(60), "a Zstandard archive"),
        (XML, "a web page, not an archive: .* download it again"),
        (b"\xef\xbb\xbf\r\n<!DOCTYPE html><html>403</html>", "a web page"),
        (b"review,sentiment\r\ngood,positive\r\n", "a single file .*give the folder that holds it"),
        ("\u00e9".encode() * 600, "a single file"),  # the 1,024th byte is half a letter
        (pickle.dumps([{"label": 1}]), "a single file"),
    ],
    ids=["empty", "gzip", "zip", "7z", "rar", "zst", "xml", "html", "csv", "text", "pickle"],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_source(tmp_path / "x").files("")
    assert str(tmp_path / "x") in one_sentence(caught.value)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_torn_zip_is_one_sentence(tmp_path: Path, keep: float) -> None:
    path = write_zip(tmp_path / "x", {"f": random.Random(1).randbytes(9000), "g": b"g"})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match="truncated or damaged") as caught:
        open_source(path).files("")
    one_sentence(caught.value)
    path.write_bytes(content[:2000] + bytes(9) + content[2009:])  # whole but for its checksum
    with pytest.raises(DataError, match="truncated or damaged"):
        dict(open_source(path).read_small(["f"]))


def test_locked_zip_is_one_sentence(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x", {"f": b"1"})
    content = bytearray(path.read_bytes())
    for magic, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(magic) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"f cannot be read .*password.*; unpack the archive"):
        dict(open_source(path).read_small(["f"]))


def test_empty_archive_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        open_source(write_tar(tmp_path / "x", {})).files("")
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nothing")


def test_corrupt_bytes_are_found_by_whoever_reads_the_stream(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(200_000)
    path = write_tar(tmp_path / "x", {"f": noise})
    source = open_source(path)
    assert source.files("") == ["f"]  # listed while whole
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(content[: len(content) // 2]))
    with pytest.raises(DataError, match="truncated"):
        dict(source.read_small(["f"]))


@pytest.mark.parametrize("archive", [False, True])
def test_huge_small_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bool
) -> None:
    monkeypatch.setattr(source_module, "MAX_SMALL_BYTES", 1 << 20)
    write = write_tar if archive else write_folder
    source = open_source(write(tmp_path / "x", {"a": b"1" * (1 << 20), "b": b"2" * 1_048_577}))
    with pytest.raises(DataError, match="b is larger than 1 MiB"):
        dict(source.read_small(["a", "b"]))
