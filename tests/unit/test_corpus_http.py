"""JSONL behind HTTP servers that give no ranges, or tell no size."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from corpus_files import read_all, section, texts

from finescope import storage
from finescope.corpus.estimate import estimate
from finescope.corpus.files import resolve
from finescope.corpus.units import inspect_file

TEXTS = [f"document {at:04d}" for at in range(500)]
DATA = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


class _Handler(BaseHTTPRequestHandler):
    """/sized: the whole file, whatever is asked for. /chunked: the same, and its size is not told. /empty: nothing."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        data = b"" if self.path.startswith("/empty") else DATA
        self._head()
        if self.path.startswith("/chunked"):
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
        else:
            self.wfile.write(data)

    def _head(self) -> None:
        self.send_response(200)
        if self.path.startswith("/chunked"):
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", "0" if self.path.startswith("/empty") else str(len(DATA)))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()
    thread.join()


def test_a_range_is_cut_from_a_file_that_comes_whole(server: str) -> None:
    assert storage.read_bytes(f"{server}/sized/a.jsonl", 30, 70) == DATA[30:70]
    assert storage.read_bytes(f"{server}/sized/a.jsonl") == DATA


@pytest.mark.parametrize("kind", ["sized", "chunked"])
def test_every_row_counts_once(server: str, kind: str) -> None:
    corpus = section(f"{server}/{kind}/a.jsonl", range_mib=6000 / 2**20)
    assert len(read_all(corpus)) == -(-len(DATA) // 6000)
    assert texts(corpus) == TEXTS


def test_a_size_that_is_not_told_is_not_zero(server: str) -> None:
    for kind, size, rows in (("chunked", None, 500), ("empty", 0, 0)):
        corpus = section(f"{server}/{kind}/a.jsonl")
        (file,) = resolve(corpus)
        assert file.info.size == size
        assert sum(inspect_file(file, corpus).documents.column("num_rows").to_pylist()) == rows
        assert estimate([file], corpus)[0] in (rows, 0)
