"""Rows that come unit by unit and are needed by rank: put by on a local disk, in memory only by the part.

Positions in the ranking are cut into parts of `PART_ROWS`. Rows of a part are written as they come, in pieces; when a range
of positions is complete, each of its parts is put in order and can be read by position, memory-mapped.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from finescope.corpus.reading import concat_rows

POSITION = "__position"  # int64, the place of a row in the ranking
UNIT = "__unit"  # int64, the unit of the corpus that it was read from
PART_ROWS = 20_000
# Rows that wait in memory before the parts they belong to grow by a piece each.
_BUFFER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Part:
    start: int  # its first position
    table: pa.Table  # in order of position, memory-mapped


class Staging:
    """Rows of any number of units. Units may differ in their columns; what is taken out has one schema."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._parts: list[_Part] = []
        self._schemas: dict[pa.Schema, int] = {}  # with the first unit that has it
        self._waiting: dict[tuple[int, pa.Schema], list[pa.Table]] = {}
        self._pieces: dict[int, list[Path]] = {}
        self._bytes = 0

    def add(self, rows: pa.Table) -> None:
        """Put by some rows of one unit, with POSITION and UNIT."""
        if rows.num_rows == 0:
            return
        rows = rows.replace_schema_metadata(None)
        unit = int(rows.column(UNIT).to_numpy()[0])
        self._schemas[rows.schema] = min(unit, self._schemas.get(rows.schema, unit))
        parts = rows.column(POSITION).to_numpy() // PART_ROWS
        for part in np.unique(parts).tolist():
            piece = rows.filter(pa.array(parts == part))
            self._waiting.setdefault((part, rows.schema), []).append(piece)
            self._bytes += piece.nbytes
        if self._bytes >= _BUFFER_BYTES:
            self._flush()

    def seal(self) -> None:
        """All rows up to a position are here: make those that came since the last call readable."""
        self._flush()
        for part in sorted(self._pieces):
            pieces = self._pieces[part]
            # The empty table puts the columns in one order, whichever piece came first.
            rows = concat_rows([self._empty(), *(_open(piece) for piece in pieces)]).sort_by(POSITION).combine_chunks()
            path = self._directory / f"part-{len(self._parts):06d}.arrow"
            _write(path, rows)
            self._parts.append(_Part(rows.column(POSITION)[0].as_py(), _open(path)))
            for piece in pieces:
                piece.unlink()
        self._pieces.clear()

    def from_position(self, start: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of the rows from a position on, part by part, in order."""
        for part in self._parts:
            if part.start >= start:
                yield part.table.select(list(columns))

    def value(self, position: int, column: str) -> object:
        """One value of one row."""
        part = self._parts[bisect_right(self._parts, position, key=lambda part: part.start) - 1]
        return part.table.column(column)[position - part.start].as_py()

    def take(self, positions: Sequence[int]) -> pa.Table:
        """Rows in the order of `positions`, all columns of all units: in the order of the first unit that has each."""
        wanted = np.asarray(positions, dtype=np.int64)
        starts = np.array([part.start for part in self._parts])
        owners = np.searchsorted(starts, wanted, side="right") - 1
        order = np.argsort(owners, kind="stable")
        taken = [self._empty()]
        for owner in np.unique(owners).tolist():
            part = self._parts[owner]
            taken.append(part.table.take(pa.array(wanted[order][owners[order] == owner] - part.start)))
        return concat_rows(taken).take(pa.array(np.argsort(order, kind="stable")))

    def _empty(self) -> pa.Table:
        return concat_rows([schema.empty_table() for schema in sorted(self._schemas, key=lambda s: self._schemas[s])])

    def _flush(self) -> None:
        for (part, _), tables in self._waiting.items():
            pieces = self._pieces.setdefault(part, [])
            pieces.append(self._directory / f"piece-{part:06d}-{len(pieces):06d}.arrow")
            _write(pieces[-1], pa.concat_tables(tables))
        self._waiting.clear()
        self._bytes = 0


def _write(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def _open(path: Path) -> pa.Table:
    """Memory-mapped: the pages are the system's to drop."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
