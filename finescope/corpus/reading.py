"""Any format into rows: what a row is in a unit of work, and which rows cannot be read."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from finescope import storage
from finescope.corpus.files import Compression, Format
from finescope.corpus.lines import json_strings, read_csv, read_jsonl, read_txt
from finescope.corpus.parquet import read_row_group
from finescope.corpus.rejects import RowsRead
from finescope.corpus.selection import Selection
from finescope.corpus.streams import Span


def read_rows(
    path: str, format: Format, compression: Compression | None, row_group: int, span: Span | None, selection: Selection
) -> RowsRead:
    """The rows of one unit, and a reject for each that cannot be read.

    Args:
        row_group: of a Parquet file; of other files `span` says what is read.
        span: of a JSONL file; None: all of it.

    Raises:
        OSError: the store does not give the file, or a compressed line file is damaged (`units.inspect_piece` finds that).
        CorpusError: the file has two columns of one name.
    """
    if format == "parquet":
        return read_row_group(path, row_group, selection)
    if format == "jsonl":
        return read_jsonl(path, compression, span, selection)
    assert row_group == 0, (path, row_group)
    return {"csv": read_csv, "txt": read_txt}[format](path, compression, selection)


def num_row_groups(path: str, format: Format) -> int:
    """The row groups of a Parquet file; one of a line file, which is read whole."""
    if format != "parquet":
        return 1
    with storage.open_input(path) as file:
        return pq.ParquetFile(file).metadata.num_row_groups


def concat_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of several units as one: a column that one lacks is null there, types are widened where they can be.

    A column whose types have nothing in common, or one type that not all values fit in, becomes strings: texts as they are,
    everything else as JSON.
    """
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    unlike = {
        name for name in names if not _fits_one_type([table.select([name]) for table in tables if name in table.schema.names])
    }
    return pa.concat_tables([_as_strings(table, unlike) for table in tables], promote_options="permissive")


def _fits_one_type(columns: list[pa.Table]) -> bool:
    """Whether tables of one column can be put together: of integers beside fractions, double holds those up to 2^53."""
    if len({column.schema.types[0] for column in columns}) == 1:
        return True
    try:
        pa.concat_tables(columns, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _as_strings(table: pa.Table, names: set[str]) -> pa.Table:
    for index, name in enumerate(table.column_names):
        if name in names:
            table = table.set_column(index, name, pa.array(json_strings(table.column(name).to_pylist()), pa.string()))
    return table
