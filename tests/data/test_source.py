"""Sources: a folder and an archive answer alike; hostile and broken archives are refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from dmx.data import source as source_module
from dmx.data.source import open_source
from dmx.errors import DataError
from tests.data.helpers import write_folder, write_tar

FILES = {
    "lra_release/listops-1000/a.tsv": b"outer",
    "lra_release/lra_release/listops-1000/a.tsv": b"inner",
    "lra_release/lra_release/b/c.bin": b"\0" * 5000,
}


@pytest.mark.parametrize("mode", ["folder", "w", "w:gz", "w:bz2", "w:xz"])
def test_folder_and_archive_answer_alike(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x"
    if mode == "folder":
        write_folder(path, FILES)
    else:
        write_tar(path, {f"./{name}": content for name, content in FILES.items()}, mode)
    source = open_source(path)
    assert source.files("lra_release/lra_release/b") == ["c.bin"]
    assert source.folders("lra_release/lra_release") == ["b", "listops-1000"]
    assert source.files("nowhere") == []
    assert source.has("lra_release/listops-1000")
    assert source.has("lra_release/listops-1000/a.tsv")
    assert not source.has("listops-1000")
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


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/passwd", "C:/x", "a\\..\\..\\b"])
def test_path_traversal_is_refused(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"fine": b"", name: b"evil"}, "w")
    with pytest.raises(DataError, match="unsafe path"):
        open_source(path).has("fine")


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


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\3\4" + b"\0" * 2000])
def test_other_files_are_no_archives(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match="no tar archive"):
        open_source(tmp_path / "x").files("")


def test_empty_archive_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        open_source(write_tar(tmp_path / "x", {})).files("")
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nothing")


def test_corrupt_bytes_are_found_by_whoever_reads_the_stream(tmp_path: Path) -> None:
    import random

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
