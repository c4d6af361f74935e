"""Why a row is not a document. Rows in = rows out + rejects, for every unit of work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from finescope import schemas

# All reasons that reading gives; a step that drops rows for another reason names its own.
UNREADABLE_FILE = "unreadable_file"  # truncated Parquet, gzip cut short: a whole file
UNREADABLE_ROW_GROUP = "unreadable_row_group"  # a damaged page: each row of the row group
BAD_JSON = "bad_json"
BAD_CSV = "bad_csv"  # more or fewer fields than the header
NOT_UTF8 = "not_utf8"
NOT_TEXT = "not_text"  # a list or an object where the template expects text
NULL_TEXT = "null_text"
EMPTY_TEXT = "empty_text"
TOO_LONG = "too_long"  # more than corpus.max_characters
NULL_ID = "null_id"
BAD_MESSAGES = "bad_messages"  # not a list of {role, content}, or refused by the chat template

_DETAIL_CHARACTERS = 200


class Reject(NamedTuple):
    """One row that is not a document."""

    row: int | None  # None: the whole file
    reason: str
    detail: str
    doc_id: str | None = None


@dataclass(frozen=True)
class RowsRead:
    """What was read of one unit. `table` has int64 `__row` first: the row's place among all rows of the unit."""

    table: pa.Table
    rejects: list[Reject]
    num_rows: int  # rows in = table.num_rows + len(rejects)


def rejects_table(rejects: Sequence[Reject], step: str, file: str, row_group: int | None) -> pa.Table:
    """The `rejects` table's rows for one unit, in order of row."""
    ordered = sorted(rejects, key=lambda reject: -1 if reject.row is None else reject.row)
    rows = [
        {
            "doc_id": reject.doc_id,
            "step": step,
            "file": file,
            "row_group": row_group,
            "row": reject.row,
            "reason": reject.reason,
            "detail": reject.detail[:_DETAIL_CHARACTERS],
        }
        for reject in ordered
    ]
    return pa.Table.from_pylist(rows, schema=schemas.REJECTS)
