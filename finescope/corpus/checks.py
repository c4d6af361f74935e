"""Values that cannot be read as text: Arrow does not look whether Parquet and CSV strings are UTF-8."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finescope.corpus import rejects
from finescope.corpus.rejects import Reject, RowsRead
from finescope.corpus.selection import Selection
from finescope.errors import CorpusError

ROW = "__row"
# Beside it the names that `curate` gives to what it finds (`curation/examine.py`, `curation/staging.py`).
_RESERVED = (ROW, "__position", "__unit", "__hash", "__sketch", "__item")


def with_rows(rows: Sequence[int] | np.ndarray, columns: dict[str, Any]) -> pa.Table:
    """A table of `columns` with the rows' numbers first.

    Raises:
        CorpusError: the corpus has a column of that reserved name.
    """
    reserved = next((name for name in columns if name in _RESERVED), None)
    if reserved is not None:
        raise CorpusError(f"the corpus has a column '{reserved}', a name that is reserved; rename it")
    return pa.table({ROW: pa.array(rows, pa.int64()), **columns})


def checked_rows(rows: np.ndarray, table: pa.Table, selection: Selection) -> RowsRead:
    """`table`, whose rows are numbers `rows` int64 [N] of the unit, less those with a bad value in a column that is read.

    Columns that are only carried along may hold anything.
    """
    columns: dict[str, Any] = {}
    bad: dict[int, Reject] = {}
    for name in table.column_names:
        column = _without_dictionary(table.column(name))
        if name in selection.text_columns:
            column, rejected = _as_text(name, column, rows)
        elif name in selection.nested_columns:
            rejected = _not_utf8(name, column, rows)
        else:
            rejected = {}
        columns[name] = column
        bad = {int(rows[place]): reject for place, reject in rejected.items()} | bad
    kept = with_rows(rows, columns)
    if bad:
        kept = kept.filter(pa.array(~np.isin(rows, np.fromiter(bad, dtype=np.int64, count=len(bad)))))
    return RowsRead(kept, [bad[row] for row in sorted(bad)], len(rows))


def replace_bad_utf8(table: pa.Table) -> pa.Table:
    """The same table with U+FFFD in place of bytes that are not UTF-8, in string columns that are not nested."""
    for index, name in enumerate(table.column_names):
        column = table.column(name)
        if _is_string(column.type) and not _is_valid(column):
            raw = pc.cast(column, pa.large_binary()).to_pylist()
            fixed = [None if value is None else value.decode("utf-8", errors="replace") for value in raw]
            table = table.set_column(index, name, pa.array(fixed, column.type))
    return table


def _as_text(name: str, column: pa.ChunkedArray, rows: np.ndarray) -> tuple[pa.ChunkedArray, dict[int, Reject]]:
    """The column with bytes as strings, and the rejects by place."""
    if pa.types.is_nested(column.type):
        given = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        return column, {int(i): Reject(int(rows[i]), rejects.NOT_TEXT, f"'{name}' is {column.type}") for i in given}
    if _is_binary(column.type):
        target = pa.large_string() if pa.types.is_large_binary(column.type) else pa.string()
        column = pc.cast(column, options=pc.CastOptions(target, allow_invalid_utf8=True))
    return column, _not_utf8(name, column, rows)


def _not_utf8(name: str, column: pa.ChunkedArray, rows: np.ndarray) -> dict[int, Reject]:
    if _is_valid(column):
        return {}
    # Not slice: a slice of a list array is validated with all its children.
    places = [i for i in range(len(column)) if not _is_valid(column.take(pa.array([i])))]
    return {i: Reject(int(rows[i]), rejects.NOT_UTF8, f"'{name}' is not UTF-8") for i in places}


def _without_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """One bad value of a dictionary would spoil the rows that do not use it."""
    return pc.cast(column, column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_valid(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _is_string(type: pa.DataType) -> bool:
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def _is_binary(type: pa.DataType) -> bool:
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)
