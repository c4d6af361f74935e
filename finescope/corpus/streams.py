"""Bytes of a file as a stream, decompressed, and how damage to a file is told from trouble with the store."""

import contextlib
import io
import threading
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa

from finescope import storage
from finescope.corpus.files import Compression

_BUFFER_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Span(NamedTuple):
    """Whole lines of a line file: a range of its bytes, decompressed."""

    start: int
    size: int


class Line(NamedTuple):
    """A line of a line file that is not blank."""

    row: int  # among the lines that are not blank, from 0
    number: int  # among all lines, from 1; 0: not known, as the reading did not begin with the file
    offset: int  # of its first byte in the file, decompressed
    end: int  # of the line, its line end counted
    data: bytes  # without surrounding white space and without a byte order mark

    @property
    def place(self) -> str:
        """Where a person finds it: the line that an editor shows, else the byte."""
        return f"line {self.number}" if self.number else f"byte {self.offset}"


@contextlib.contextmanager
def open_stream(path: str, compression: Compression | None) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed. Arrow decompresses: fsspec knows zstd only where another package is installed."""
    with storage.open_input(path) as raw:
        yield raw if compression is None else decompressed(raw, compression)


def decompressed(raw: BinaryIO, compression: Compression) -> BinaryIO:
    """What a compressed stream holds."""
    source = pa.PythonFile(raw, mode="r")
    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(source, compression), _BUFFER_BYTES))  # pyright: ignore[reportArgumentType]


def iterate_lines(path: str, compression: Compression | None, span: Span | None = None) -> Iterator[Line]:
    """The lines of a file, or of a span of it, that are not blank; rows are counted from where the reading begins."""
    if span is not None:
        yield from lines_of(io.BytesIO(_read_span(path, compression, span)), span.start)
        return
    with open_stream(path, compression) as stream:
        yield from lines_of(stream)


def lines_of(stream: Iterable[bytes], start: int = 0) -> Iterator[Line]:
    """The lines that are not blank of a stream of lines which begins at byte `start` of its file."""
    row, offset = 0, start
    for number, raw in enumerate(stream, start=1):
        data = raw.removeprefix(_BYTE_ORDER_MARK).strip() if offset == 0 else raw.strip()
        if data:
            yield Line(row, 0 if start else number, offset, offset + len(raw), data)
            row += 1
        offset += len(raw)


def is_damage(error: Exception) -> bool:
    """Whether `error` says that the bytes are damaged, and not that the store failed to give them.

    Arrow reports damage as ArrowInvalid or as a plain OSError without an errno; stores raise subclasses or set errno.
    """
    return isinstance(error, pa.ArrowInvalid) or (type(error) is OSError and error.errno is None)


class _Resting(NamedTuple):
    """A decompressed stream between two readings."""

    path: str
    etag: str
    offset: int
    stream: BinaryIO
    closing: contextlib.ExitStack


class _Kept(threading.local):
    """The stream that a thread read last. The units of a compressed file come in order, or every n-th of them to one of n
    actors: who goes on where the last reading ended decompresses the file once, and not anew for each unit."""

    resting: _Resting | None = None


_kept = _Kept()


def _read_span(path: str, compression: Compression | None, span: Span) -> bytes:
    if compression is None:
        return storage.read_bytes(path, span.start, span.start + span.size)
    # Asked before the file is opened, so that what replaces it meanwhile has another one.
    etag = storage.info(path).etag
    found, _kept.resting = _kept.resting, None
    if found is not None and ((found.path, found.etag) != (path, etag) or found.offset > span.start):
        found.closing.close()
        found = None
    if found is None:
        closing = contextlib.ExitStack()
        found = _Resting(path, etag, 0, closing.enter_context(open_stream(path, compression)), closing)
    with contextlib.ExitStack() as failed:
        failed.push(found.closing)
        left = span.start - found.offset
        while left and (skipped := len(found.stream.read(min(left, _BUFFER_BYTES)))):
            left -= skipped
        data = found.stream.read(span.size)
        failed.pop_all()
    _kept.resting = found._replace(offset=span.start + len(data))
    return data
