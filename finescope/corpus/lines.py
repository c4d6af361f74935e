"""Rows of JSONL, CSV and text files.

JSONL is cut into units at line ends. CSV is not: whether a line end is inside of quotes is known only to who has read all that
stands before it. A text file is one document.
"""

import csv
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from finescope.corpus import rejects
from finescope.corpus.checks import checked_rows, with_rows
from finescope.corpus.files import Compression
from finescope.corpus.rejects import Reject, RowsRead
from finescope.corpus.selection import Selection
from finescope.corpus.streams import Line, Span, iterate_lines, open_stream
from finescope.corpus.text import scalar_text
from finescope.errors import CorpusError

_MAX_BLOCK_BYTES = (1 << 31) - 1


def parse_line(data: bytes) -> dict[str, Any]:
    """The object of one JSON line.

    Raises:
        UnicodeError: it is not UTF-8, or names half of a surrogate pair, which no UTF-8 text can hold.
        ValueError: it is not JSON, or not an object.
    """
    text = data.decode("utf-8")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    if b"\\u" in data and b"\\ud" in data.lower():
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def parse_or_reject(line: Line, text_columns: frozenset[str]) -> dict[str, Any] | Reject:
    """The object of a line, or why there is none; `text_columns` must hold neither lists nor objects."""
    try:
        row = parse_line(line.data)
    except UnicodeError as error:
        return Reject(line.row, rejects.NOT_UTF8, f"{line.place}: {error}")
    except ValueError as error:
        return Reject(line.row, rejects.BAD_JSON, f"{line.place}: {error}")
    for name in sorted(text_columns):
        if isinstance(row.get(name), list | dict):
            detail = f"{line.place}: '{name}' is {'a list' if isinstance(row[name], list) else 'an object'}"
            return Reject(line.row, rejects.NOT_TEXT, detail)
    return row


def read_jsonl(path: str, compression: Compression | None, span: Span | None, selection: Selection) -> RowsRead:
    """Rows of a JSONL file, or of a span of it; blank lines are no rows. A key that a row lacks is null.

    A column whose values have no common Arrow type becomes strings: texts as they are, everything else as JSON. So do the
    text columns, always: 1 beside 0.5 would be 1.0, and a row's text and id must not depend on which others are read with it.
    """
    rows: list[int] = []
    values: list[dict[str, Any]] = []
    rejected: list[Reject] = []
    for line in iterate_lines(path, compression, span):
        if selection.stops_at(line.row):
            break
        if not selection.wants(line.row):
            continue
        parsed = parse_or_reject(line, selection.text_columns)
        if isinstance(parsed, Reject):
            rejected.append(parsed)
        else:
            rows.append(line.row)
            values.append(parsed)
    names = selection.columns if selection.columns is not None else tuple(dict.fromkeys(key for row in values for key in row))
    columns = {name: _column(name, [row.get(name) for row in values], selection) for name in names}
    return RowsRead(with_rows(rows, columns), rejected, len(rows) + len(rejected))


def _column(name: str, values: list[Any], selection: Selection) -> pa.Array:
    if name in selection.text_columns:
        return pa.array([scalar_text(value) for value in values], pa.string())
    return column_of(values)


def read_csv(path: str, compression: Compression | None, selection: Selection) -> RowsRead:
    """Rows of a CSV file with a header; all values are strings, an empty field is an empty string."""
    with open_stream(path, compression) as stream:
        data = stream.read()
    names = csv_header(data)
    if not names:
        return RowsRead(with_rows([], {}), [], 0)
    if len(set(names)) != len(names):
        raise CorpusError(f"'{path}' has two columns of one name: {', '.join(names)}")
    bad: list[Reject] = []

    def skip(invalid: pyarrow.csv.InvalidRow) -> str:
        # Arrow counts the header as row 1 and does not count blank lines.
        detail = f"{invalid.actual_columns} fields where the header has {invalid.expected_columns}: {invalid.text}"
        bad.append(Reject(invalid.number - 2, rejects.BAD_CSV, detail))
        return "skip"

    table = pyarrow.csv.read_csv(
        io.BytesIO(data),
        # One block: a value with newlines must not straddle two. One thread: rows are numbered only then.
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=min(max(len(data), 1), _MAX_BLOCK_BYTES)),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
        convert_options=pyarrow.csv.ConvertOptions(check_utf8=False, column_types=dict.fromkeys(names, pa.string())),
    )
    num_rows = table.num_rows + len(bad)
    numbers_of_bad = np.array([reject.row for reject in bad], dtype=np.int64)
    good = np.setdiff1d(np.arange(num_rows), numbers_of_bad)
    keep = selection.mask(good)
    wanted = names if selection.columns is None else list(selection.columns)
    read = checked_rows(good[keep], table.select(wanted).filter(pa.array(keep)), selection)
    kept_bad = [reject for reject, kept in zip(bad, selection.mask(numbers_of_bad), strict=True) if kept]
    return RowsRead(read.table, [*read.rejects, *kept_bad], read.num_rows + len(kept_bad))


def read_txt(path: str, compression: Compression | None, selection: Selection) -> RowsRead:
    """A text file: one row with one column `text`."""
    if selection.stops_at(0) or not selection.wants(0):
        return RowsRead(with_rows([], {"text": pa.array([], pa.string())}), [], 0)
    with open_stream(path, compression) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowsRead(with_rows([], {"text": pa.array([], pa.string())}), [Reject(0, rejects.NOT_UTF8, str(error))], 1)
    return RowsRead(with_rows([0], {"text": pa.array([text])}), [], 1)


def column_of(values: list[Any]) -> pa.Array:
    """An Arrow array of JSON values; strings where they have no common type, or one that Parquet cannot hold."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array(json_strings(values), pa.string())
    return pa.array(json_strings(values), pa.string()) if _has_empty_struct(array.type) else array


def json_strings(values: list[Any]) -> list[str | None]:
    """Strings as they are, null as null, everything else as JSON."""
    return [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for value in values
    ]


def csv_header(data: bytes) -> list[str]:
    """The names in the first line of a CSV file that is not blank; none where there is no such line.

    Raises:
        pa.ArrowInvalid: it is damaged, as Arrow says of all that comes after it: a name is too long, a quote never closed.
    """
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        return next((fields for fields in csv.reader(text) if fields), [])
    except csv.Error as error:
        raise pa.ArrowInvalid(f"CSV header: {error}") from error


def _has_empty_struct(type: pa.DataType) -> bool:
    children = [type.field(index).type for index in range(type.num_fields)]
    return (pa.types.is_struct(type) and not children) or any(_has_empty_struct(child) for child in children)
