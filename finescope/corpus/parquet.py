"""Rows of one row group of a Parquet file."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finescope import storage
from finescope.corpus import rejects
from finescope.corpus.checks import checked_rows
from finescope.corpus.rejects import Reject, RowsRead
from finescope.corpus.selection import Selection
from finescope.corpus.streams import is_damage


def read_row_group(path: str, row_group: int, selection: Selection) -> RowsRead:
    """The rows of one row group; only the columns asked for are read.

    A row group with a damaged page gives a reject for each of its rows.
    """
    with storage.open_input(path) as file:
        parquet = pq.ParquetFile(file)
        num_rows = parquet.metadata.row_group(row_group).num_rows
        rows = np.flatnonzero(selection.mask(np.arange(num_rows)))
        names = None if selection.columns is None else list(selection.columns)
        try:
            table = parquet.read_row_group(row_group, columns=names)
        except (OSError, pa.ArrowInvalid) as error:
            if not is_damage(error):
                raise
            empty = checked_rows(
                rows[:0], parquet.schema_arrow.empty_table().select(names or parquet.schema_arrow.names), selection
            )
            damaged = [Reject(int(row), rejects.UNREADABLE_ROW_GROUP, str(error)) for row in rows]
            return RowsRead(empty.table, damaged, len(rows))
    if selection.rows is not None:
        table = table.take(pa.array(rows))
    return checked_rows(rows, table.slice(0, len(rows)), selection)
