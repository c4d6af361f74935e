"""How much a corpus holds, about, from the heads of a few of its files: for a plan, before anything is counted."""

import io
from collections.abc import Sequence

import pyarrow as pa

from finescope import storage
from finescope.config import CorpusSection
from finescope.corpus.files import Compression, CorpusFile
from finescope.corpus.lines import csv_header, parse_or_reject
from finescope.corpus.rejects import Reject
from finescope.corpus.streams import is_damage, lines_of
from finescope.corpus.units import check_columns, inspect_range

_SAMPLED_FILES = 8
_HEAD_BYTES = 1 << 20
_STEP_BYTES = 1 << 12


def estimate(files: Sequence[CorpusFile], section: CorpusSection) -> tuple[int, int]:
    """Documents, and bytes of their text, of all files: those of up to eight, evenly taken, scaled to the bytes of all.

    Raises:
        CorpusError: a column that the recipe names is not there.
    """
    count = min(_SAMPLED_FILES, len(files))
    sampled = [files[at * len(files) // count] for at in range(count)]
    found = [_estimate(file, section) for file in sampled]
    scale = sum(file.info.size for file in files) / max(1, sum(file.info.size for file in sampled))
    return round(scale * sum(rows for rows, _ in found)), round(scale * sum(size for _, size in found))


def _estimate(file: CorpusFile, section: CorpusSection) -> tuple[float, float]:
    """Rows and bytes of one file, from a Parquet footer or the first MiB; none of a file that cannot be read."""
    if file.format == "parquet":
        units = inspect_range(file, section.model_copy(update={"id": None})).documents
        return sum(units.column("num_rows").to_pylist()), sum(units.column("bytes").to_pylist())
    if file.format == "txt":
        return 1.0, float(file.info.size)
    raw = storage.read_bytes(file.info.path, 0, min(_HEAD_BYTES, file.info.size))
    data = raw if file.compression is None else _decompressed_head(raw, file.compression)
    lines = list(lines_of(io.BytesIO(data)))
    if not lines:
        return 0.0, 0.0
    if file.format == "csv":
        columns, rows = csv_header(data), len(lines) - 1
    else:
        parsed = [row for line in lines if not isinstance(row := parse_or_reject(line, frozenset()), Reject)]
        columns, rows = list(dict.fromkeys(key for row in parsed for key in row)), len(lines)
    if columns:
        check_columns(file, section, columns)
    scale = file.info.size / len(raw)
    return rows * scale, len(data) * scale


def _decompressed_head(raw: bytes, compression: Compression) -> bytes:
    """What the first bytes of a compressed file hold: the end of the stream is not among them."""
    stream, parts = pa.CompressedInputStream(pa.BufferReader(raw), compression), []
    try:
        while part := stream.read(_STEP_BYTES):
            parts.append(part)
    except (OSError, pa.ArrowInvalid) as error:
        if not is_damage(error):
            raise
    return b"".join(parts)
