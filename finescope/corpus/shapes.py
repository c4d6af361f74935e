"""Common shapes of rows, recognised by their columns: where a corpus has no column `text` and its recipe says nothing else."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from finescope import storage
from finescope.config import CorpusSection
from finescope.corpus.files import Compression, CorpusFile
from finescope.corpus.lines import csv_header, parse_or_reject
from finescope.corpus.rejects import Reject
from finescope.corpus.streams import is_damage, lines_of

# Files that are looked into, one after the other, until one can be read.
_TRIED_FILES = 8
_HEAD_BYTES = 1 << 20
_MOST_HEAD_BYTES = 1 << 26
_STEP_BYTES = 1 << 12


class Shape(NamedTuple):
    """What the text of a row is made of."""

    name: str
    columns: tuple[str, ...]  # all must be there
    text: str | None = None  # corpus.text
    messages: str | None = None  # corpus.messages


# In order of preference. What of a row is prompt and what response, `text.prompt_and_response` tells by the same columns.
SHAPES = (
    Shape("Alpaca", ("instruction", "input", "output"), text="{instruction}\n{input}\n{output}"),
    Shape("Alpaca", ("instruction", "output"), text="{instruction}\n{output}"),
    Shape("prompt and completion", ("prompt", "completion"), text="{prompt}\n{completion}"),
    Shape("prompt and response", ("prompt", "response"), text="{prompt}\n{response}"),
    Shape("messages", ("messages",), messages="messages"),
    Shape("ShareGPT", ("conversations",), messages="conversations"),
)


def recognise(section: CorpusSection, files: Sequence[CorpusFile]) -> Shape | None:
    """The shape of the corpus's rows, by the first of its files that can be read; None: the recipe says what the text is.

    That is so where it names columns, and where there is the column `text`.
    """
    if section.text != CorpusSection.model_fields["text"].default or section.messages is not None:
        return None
    columns = next((found for file in files[:_TRIED_FILES] if (found := columns_of(file))), ())
    if section.text in columns:
        return None
    return next((shape for shape in SHAPES if set(shape.columns) <= set(columns)), None)


def shaped(section: CorpusSection, shape: Shape | None) -> CorpusSection:
    """The section that says what was recognised."""
    if shape is None:
        return section
    return section.model_copy(update={"text": shape.text or section.text, "messages": shape.messages})


def shaped_as_indexed(section: CorpusSection, facts: Mapping[str, Any]) -> CorpusSection:
    """The corpus as `index` found it (its facts): with the shape of its rows where the recipe names no columns."""
    shape = facts.get("shape")
    return shaped(section, None if shape is None else Shape(**shape))


def columns_of(file: CorpusFile) -> tuple[str, ...]:
    """A file's columns, from its footer or its head; none where they cannot be read."""
    if file.format == "txt":
        return ("text",)
    try:
        if file.format != "parquet":
            return columns_in(head_of(file)[0], file)
        with storage.open_input(file.info.path) as handle:
            return tuple(pq.read_schema(handle).names)
    except (OSError, pa.ArrowInvalid) as error:
        if not is_damage(error):
            raise
        return ()


def head_of(file: CorpusFile) -> tuple[bytes, float]:
    """The first MiB of a line file, decompressed, without a line that is cut; and the file's size in such heads.

    More where a longer line comes first, up to 64 MiB. The size is 1 where the server does not tell it.
    """
    size, asked = file.info.size, _HEAD_BYTES
    while True:
        raw = storage.read_bytes(file.info.path, 0, asked if size is None else min(asked, size))
        data = raw if file.compression is None else _decompressed(raw, file.compression)
        ended = len(raw) < asked if size is None else len(raw) == size
        whole = data if ended else data[: data.rfind(b"\n") + 1]
        if whole.strip() or ended or asked >= _MOST_HEAD_BYTES:
            return whole, (len(raw) if size is None else size) / max(1, len(raw))
        asked *= 4


def columns_in(head: bytes, file: CorpusFile) -> tuple[str, ...]:
    """The columns of a JSONL or CSV file as its head tells them.

    Raises:
        pa.ArrowInvalid: the header of a CSV file is damaged.
    """
    if file.format == "csv":
        return tuple(csv_header(head))
    parsed = (parse_or_reject(line, frozenset()) for line in lines_of(io.BytesIO(head)))
    return tuple(dict.fromkeys(key for row in parsed if not isinstance(row, Reject) for key in row))


def _decompressed(raw: bytes, compression: Compression) -> bytes:
    """What the first bytes of a compressed file hold: the end of the stream is not among them."""
    stream, parts = pa.CompressedInputStream(pa.BufferReader(raw), compression), []
    try:
        while part := stream.read(_STEP_BYTES):
            parts.append(part)
    except (OSError, pa.ArrowInvalid) as error:
        if not is_damage(error):
            raise
    return b"".join(parts)
