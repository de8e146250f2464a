"""Downloads from a server on this machine: resume, checksum, change of the file, and refusals."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dmx.data.download import download
from dmx.data.prepare import READERS, prepare_data
from dmx.data.readers import archives as text_reader
from dmx.errors import DataError
from tests.data.helpers import write_tar
from tests.data.test_text_and_retrieval import REVIEWS


class Server:
    """Serves `content` with an ETag; can break off, ignore ranges, or answer with an error."""

    def __init__(self) -> None:
        self.content = bytes(range(256)) * 20_000
        self.tag = '"one"'
        self.ranges = True
        self.break_after: list[int] = []
        self.status = 200
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/data/set.tar.gz"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range", "")
        self.asked.append(asked)
        if self.status != 200:
            request.send_error(self.status)
            return
        start = 0
        if asked and self.ranges and request.headers.get("If-Range") == self.tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.content):
                request.send_error(416)
                return
        body = self.content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", self.tag)
        request.end_headers()
        if self.break_after:
            body = body[: self.break_after.pop(0)]
        request.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def checksum(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def test_download_is_whole_and_fetched_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        path = download(server.address, tmp_path / "d", checksum(server.content))
    assert path == tmp_path / "d" / "set.tar.gz"
    assert path.read_bytes() == server.content
    assert server.asked == [""]
    assert sorted(p.name for p in path.parent.iterdir()) == [".set.tar.gz.lock", "set.tar.gz"]


def test_broken_connection_is_continued(server: Server, tmp_path: Path) -> None:
    server.break_after = [2_000_000, 1_000_000]
    path = download(server.address, tmp_path, checksum(server.content))
    assert path.read_bytes() == server.content
    first, second, third = server.asked
    assert first == ""
    for asked, sent in ((second, 2_000_000), (third, 3_000_000)):
        assert sent - 200_000 < int(asked.removeprefix("bytes=").removesuffix("-")) <= sent


def test_later_run_continues_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_000_000] * 3
    with pytest.raises(DataError, match=r"broke off.*set.tar.gz.part is kept.*--source"):
        download(server.address, tmp_path)
    assert not (tmp_path / "set.tar.gz").exists()
    assert download(server.address, tmp_path).read_bytes() == server.content
    assert server.asked[-1].startswith("bytes=2")


def test_changed_file_is_not_mixed_with_the_old_one(server: Server, tmp_path: Path) -> None:
    server.break_after = [1_000_000] * 3
    with pytest.raises(DataError):
        download(server.address, tmp_path)
    server.content, server.tag = b"new" * 1_000_000, '"two"'
    assert download(server.address, tmp_path).read_bytes() == server.content


def test_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges, server.break_after = False, [1_000_000]
    path = download(server.address, tmp_path, checksum(server.content))
    assert path.read_bytes() == server.content


def test_part_that_was_complete_is_accepted(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz.part").write_bytes(server.content)
    (tmp_path / "set.tar.gz.part.tag").write_text('"one"')
    path = download(server.address, tmp_path, checksum(server.content))
    assert path.read_bytes() == server.content


def test_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instead of md5:00.*--source"):
        download(server.address, tmp_path, "md5:00")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("set")]


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (404, 1), (503, 3)])
def test_refusal_names_address_and_source(
    server: Server, tmp_path: Path, status: int, tries: int
) -> None:
    server.status = status
    with pytest.raises(DataError, match=rf"HTTP {status}.*--source") as caught:
        download(server.address, tmp_path)
    assert server.address in str(caught.value)
    assert len(server.asked) == tries


def test_no_server_and_no_http(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot download http://127\.0\.0\.1:9/x\.gz: .*--source"):
        download("http://127.0.0.1:9/x.gz", tmp_path)
    with pytest.raises(DataError, match="no http address"):
        download("file:///etc/passwd", tmp_path)


def test_text_without_a_source_is_downloaded_and_prepared(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = write_tar(tmp_path / "x.tar.gz", REVIEWS).read_bytes()
    reader = READERS.get("lra-text")
    monkeypatch.setattr(text_reader, "PER_CLASS", 2)
    changed = {"address": server.address, "checksum": checksum(server.content)}
    monkeypatch.setitem(READERS._values, "lra-text", type(reader)(**{**vars(reader), **changed}))
    store = prepare_data("text", tmp_path / "data")
    assert len(store.split("train")) == 4
    assert prepare_data("text", tmp_path / "data").manifest == store.manifest
    assert server.asked == [""]
