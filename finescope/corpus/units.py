"""Units of work: a row group of Parquet, a range of JSONL, any other file. What a file holds, before a model is loaded."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from finescope import schemas, storage
from finescope.config import CorpusSection
from finescope.corpus import rejects
from finescope.corpus.checks import ROW
from finescope.corpus.files import CorpusFile
from finescope.corpus.lines import parse_or_reject
from finescope.corpus.reading import read_rows
from finescope.corpus.rejects import Reject, rejects_table
from finescope.corpus.row_texts import ids_of, text_columns
from finescope.corpus.selection import Selection
from finescope.corpus.streams import Line, Span, is_damage, lines_of, open_stream
from finescope.corpus.text import Template, scalar_text
from finescope.errors import CorpusError

IDS = pa.schema([("id", pa.string())])
# A file's columns are the keys of its first lines, so many of them.
_SAMPLED_LINES = 1000
# The end of a range's last line is looked for by so many bytes at a time.
_LOOKED_AHEAD = 1 << 18
# Ids are packed by so many.
_PACKED_IDS = 1 << 18


@dataclass(frozen=True)
class Inspection:
    """A file of the corpus, or one range of it."""

    documents: pa.Table  # schemas.DOCUMENTS, one row a unit; none where the file cannot be read
    rejects: pa.Table  # schemas.REJECTS: one row where the file cannot be read
    columns: tuple[str, ...]  # the source's columns (JSONL: the keys of the first 1,000 lines that parse)
    ids: pa.Table | None  # IDS, where corpus.id is set: of the rows whose id is neither null nor unreadable


@dataclass(frozen=True)
class _Contents:
    columns: tuple[str, ...]
    units: list[dict[str, Any]]  # num_rows, bytes, start
    ids: pa.Table | None
    first: int = 0  # number of the first unit


def needed_columns(section: CorpusSection) -> tuple[str, ...]:
    """The columns that the recipe names: id, text or messages, prompt and response.

    Raises:
        RecipeError: one of the templates is not a template.
    """
    columns = [*text_columns(section)]
    for name, source in (("corpus.prompt", section.prompt), ("corpus.response", section.response)):
        columns += Template.parse(source, name).columns if source is not None else ()
    return tuple(dict.fromkeys(columns))


def num_ranges(file: CorpusFile, section: CorpusSection) -> int:
    """In how many ranges a file can be looked at, each for itself: 1 for all but JSONL of known size that is not compressed."""
    if file.format != "jsonl" or file.compression is not None or file.info.size is None:
        return 1
    return max(1, -(-file.info.size // range_bytes(section)))


def range_bytes(section: CorpusSection) -> int:
    """A line belongs to the range of so many bytes, counted from the start of the file, in which it begins."""
    return max(1, int(section.range_mib * 2**20))


def inspect_range(file: CorpusFile, section: CorpusSection, number: int = 0) -> Inspection:
    """The units of range `number` of a file (see `num_ranges`), counted: one of plain JSONL, all that a compressed file has.

    Parquet is counted from the footer, everything else is read through. Ids are read where the recipe names them.

    Raises:
        CorpusError: a column that the recipe names is not there; the message lists those that are.
    """
    inspect = {"parquet": _inspect_parquet, "jsonl": _inspect_jsonl}.get(file.format, _inspect_whole)
    try:
        found = inspect(file, section, number)
    except (OSError, pa.ArrowInvalid) as error:
        if not is_damage(error):
            raise
        damage = rejects_table([Reject(None, rejects.UNREADABLE_FILE, str(error))], "index", file.info.path, None)
        return Inspection(schemas.DOCUMENTS.empty_table(), damage, (), IDS.empty_table() if section.id else None)
    place = {"file": file.info.path, "etag": file.info.etag}
    units = [{**place, **unit, "row_group": at} for at, unit in enumerate(found.units, start=found.first)]
    documents = pa.Table.from_pylist(units, schema=schemas.DOCUMENTS)
    return Inspection(documents, schemas.REJECTS.empty_table(), found.columns, found.ids)


def inspect_file(file: CorpusFile, section: CorpusSection) -> Inspection:
    """All units of one file, as `inspect_range` finds them."""
    parts = [inspect_range(file, section, number) for number in range(num_ranges(file, section))]
    ids = [part.ids for part in parts if part.ids is not None]
    return Inspection(
        pa.concat_tables([part.documents for part in parts]),
        pa.concat_tables([part.rejects for part in parts]),
        parts[0].columns,
        pa.concat_tables(ids) if ids else None,
    )


def _inspect_parquet(file: CorpusFile, section: CorpusSection, _: int) -> _Contents:
    with storage.open_input(file.info.path) as handle:
        parquet = pq.ParquetFile(handle)
        columns = tuple(parquet.schema_arrow.names)
        check_columns(file, section, columns)
        needed = set(needed_columns(section))
        units = []
        for index in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(index)
            leaves = [group.column(i) for i in range(group.num_columns)]
            num_bytes = sum(c.total_uncompressed_size for c in leaves if c.path_in_schema in needed or _top(c) in needed)
            units.append({"num_rows": group.num_rows, "bytes": num_bytes, "start": None})
    ids = (
        None
        if section.id is None
        else pa.concat_tables([_ids(file, section.id, index) for index in range(len(units))] or [IDS.empty_table()])
    )
    return _Contents(columns, units, ids)


def _top(column: pq.ColumnChunkMetaData) -> str:
    return column.path_in_schema.split(".", 1)[0]


def _inspect_whole(file: CorpusFile, section: CorpusSection, _: int) -> _Contents:
    """CSV and text: one unit a file."""
    read = read_rows(file.info.path, file.format, file.compression, 0, None, Selection())
    columns = tuple(name for name in read.table.column_names if name != ROW)
    if columns:
        check_columns(file, section, columns)
    ids = None if section.id is None else _ids(file, section.id, 0)
    return _Contents(columns, [{"num_rows": read.num_rows, "bytes": file.info.size or 0, "start": None}], ids)


def _inspect_jsonl(file: CorpusFile, section: CorpusSection, number: int) -> _Contents:
    if file.compression is None and file.info.size is not None:
        span, data = _range(file, number, range_bytes(section), file.info.size)
        return _tally(lines_of(io.BytesIO(data), span.start), span.start, file, section, number)
    with open_stream(file.info.path, file.compression) as stream:
        # Of a file whose size is not told fsspec's own lines cannot be read, as it seeks for them.
        lines = stream if file.compression else io.BufferedReader(cast(io.RawIOBase, stream))
        return _tally(lines_of(lines), 0, file, section, 0)


def _range(file: CorpusFile, number: int, size: int, end: int) -> tuple[Span, bytes]:
    """The lines that begin in a range of a file of `end` bytes, however far the last of them goes on."""
    path, first, last = file.info.path, number * size, min((number + 1) * size, end)
    # With the byte before it, which tells whether a line begins with the range.
    before = 1 if first else 0
    data = storage.read_bytes(path, first - before, last)
    skipped = data.find(b"\n") + 1 if before else 0
    if before and (skipped == 0 or skipped == len(data)):
        return Span(first, 0), b""
    parts = [data[skipped:]]
    while not parts[-1].endswith(b"\n") and last < end:
        ahead = storage.read_bytes(path, last, min(last + _LOOKED_AHEAD, end))
        if not ahead:
            break  # the file has become shorter since it was listed, which its etag will tell
        parts.append(ahead[: ahead.find(b"\n") + 1] or ahead)
        last += len(parts[-1])
    whole = b"".join(parts)
    return Span(first - before + skipped, len(whole)), whole


def _tally(lines: Iterable[Line], start: int, file: CorpusFile, section: CorpusSection, first: int) -> _Contents:
    """Count lines by unit, from unit `first` on, which begins at byte `start`. Of the first unit's the columns are checked."""
    size = range_bytes(section)
    units = [{"num_rows": 0, "bytes": 0, "start": start}]
    columns: dict[str, None] = {}
    ids = _PackedIds(section.id)
    for line in lines:
        while len(units) <= line.offset // size - first:
            units.append({"num_rows": 0, "bytes": 0, "start": line.offset})
        unit = units[-1]
        unit["num_rows"] += 1
        unit["bytes"] = line.end - unit["start"]
        if first == 0 and line.row < _SAMPLED_LINES:
            parsed = parse_or_reject(line, frozenset())
            columns.update({} if isinstance(parsed, Reject) else dict.fromkeys(parsed))
        ids.add(line)
    if columns:
        check_columns(file, section, tuple(columns))
    return _Contents(tuple(columns), units, ids.table(), first)


class _PackedIds:
    """Collects the ids of lines, packed: a compressed file may hold very many."""

    def __init__(self, column: str | None) -> None:
        self._column, self._loose, self._packed = column, [], []

    def add(self, line: Line) -> None:
        if self._column is None:
            return
        parsed = parse_or_reject(line, frozenset([self._column]))
        found = None if isinstance(parsed, Reject) else scalar_text(parsed.get(self._column))
        if found:
            self._loose.append(found)
        if len(self._loose) == _PACKED_IDS:
            self._pack()

    def table(self) -> pa.Table | None:
        """IDS; None: there is no such column."""
        if self._column is None:
            return None
        self._pack()
        return pa.concat_tables(self._packed)

    def _pack(self) -> None:
        self._packed.append(pa.table({"id": pa.array(self._loose, pa.string())}))
        self._loose = []


def check_columns(file: CorpusFile, section: CorpusSection, columns: Sequence[str]) -> None:
    """Hold a file's columns to those that the recipe names.

    Raises:
        CorpusError: one of them is not there, or two have one name.
    """
    missing = [name for name in needed_columns(section) if name not in columns]
    if missing:
        named = ", ".join(f"'{name}'" for name in missing)
        raise CorpusError(f"'{file.info.path}' has no column {named}; it has: {', '.join(columns)}")
    if len(set(columns)) != len(columns):
        raise CorpusError(f"'{file.info.path}' has two columns of one name: {', '.join(columns)}")


def _ids(file: CorpusFile, column: str, row_group: int) -> pa.Table:
    selection = Selection((column,), text_columns=frozenset([column]))
    rows = read_rows(file.info.path, file.format, file.compression, row_group, None, selection).table
    return pa.table({"id": pa.array([found for found in ids_of(rows, column) if found is not None], pa.string())})
