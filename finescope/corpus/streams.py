"""Bytes of a file as a stream, decompressed, and how damage to a file is told from trouble with the store."""

import contextlib
import io
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

import pyarrow as pa

from finescope import storage
from finescope.corpus.files import Compression

_BUFFER_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line of a line file that is not blank."""

    row: int  # among the lines that are not blank, from 0
    number: int  # among all lines, from 1: what an editor shows
    data: bytes


@contextlib.contextmanager
def open_stream(path: str, compression: Compression | None) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed. Arrow decompresses: fsspec knows zstd only where another package is installed."""
    with storage.open_input(path) as raw:
        if compression is None:
            yield raw
        else:
            source = pa.PythonFile(raw, mode="r")
            yield cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(source, compression), _BUFFER_BYTES))  # pyright: ignore[reportArgumentType]


def iterate_lines(path: str, compression: Compression | None) -> Iterator[Line]:
    """The lines that are not blank, without surrounding white space and without a byte order mark."""
    row = 0
    with open_stream(path, compression) as stream:
        for number, raw in enumerate(stream, start=1):
            data = raw.removeprefix(_BYTE_ORDER_MARK).strip() if number == 1 else raw.strip()
            if data:
                yield Line(row, number, data)
                row += 1


def is_damage(error: Exception) -> bool:
    """Whether `error` says that the bytes are damaged, and not that the store failed to give them.

    Arrow reports damage as ArrowInvalid or as a plain OSError without an errno; stores raise subclasses or set errno.
    """
    return isinstance(error, pa.ArrowInvalid) or (type(error) is OSError and error.errno is None)
