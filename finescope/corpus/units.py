"""Units of work: (file, row group). What a file holds, before a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from finescope import schemas, storage
from finescope.config import CorpusSection
from finescope.corpus import rejects
from finescope.corpus.checks import ROW
from finescope.corpus.files import CorpusFile
from finescope.corpus.lines import jsonl_columns
from finescope.corpus.reading import read_rows
from finescope.corpus.rejects import Reject, rejects_table
from finescope.corpus.row_texts import ids_of, text_columns
from finescope.corpus.selection import Selection
from finescope.corpus.streams import is_damage, iterate_lines
from finescope.corpus.text import Template
from finescope.errors import CorpusError

IDS = pa.schema([("id", pa.string()), ("file", pa.string()), ("row_group", pa.int32()), ("row", pa.int64())])


@dataclass(frozen=True)
class FileInspection:
    """One file of the corpus."""

    documents: pa.Table  # schemas.DOCUMENTS, one row a unit; none where the file cannot be read
    rejects: pa.Table  # schemas.REJECTS: one row where the file cannot be read
    columns: tuple[str, ...]  # the source's columns (JSONL: the keys of the first 1,000 lines that parse)
    ids: pa.Table | None  # IDS, where corpus.id is set: rows whose id is neither null nor unreadable


def needed_columns(section: CorpusSection) -> tuple[str, ...]:
    """The columns that the recipe names: id, text or messages, prompt and response.

    Raises:
        RecipeError: one of the templates is not a template.
    """
    columns = [*text_columns(section)]
    for name, source in (("corpus.prompt", section.prompt), ("corpus.response", section.response)):
        columns += Template.parse(source, name).columns if source is not None else ()
    return tuple(dict.fromkeys(columns))


def inspect_file(file: CorpusFile, section: CorpusSection) -> FileInspection:
    """The units of one file, counted. Parquet: from the footer; line files are read through; ids are read where named.

    `bytes` of a unit: uncompressed bytes of the row group's needed columns, or the size of the line file.

    Raises:
        CorpusError: a column that the recipe names is not there; the message lists those that are.
    """
    try:
        columns, sizes = _inspect_parquet(file, section) if file.format == "parquet" else _inspect_lines(file, section)
        ids = _ids(file, section.id, len(sizes)) if section.id is not None else None
    except (OSError, pa.ArrowInvalid) as error:
        if not is_damage(error):
            raise
        damage = rejects_table([Reject(None, rejects.UNREADABLE_FILE, str(error))], "index", file.info.path, None)
        return FileInspection(schemas.DOCUMENTS.empty_table(), damage, (), IDS.empty_table() if section.id else None)
    units = [
        {"file": file.info.path, "row_group": i, "num_rows": num_rows, "bytes": num_bytes, "etag": file.info.etag}
        for i, (num_rows, num_bytes) in enumerate(sizes)
    ]
    return FileInspection(
        pa.Table.from_pylist(units, schema=schemas.DOCUMENTS), schemas.REJECTS.empty_table(), tuple(columns), ids
    )


def _inspect_parquet(file: CorpusFile, section: CorpusSection) -> tuple[list[str], list[tuple[int, int]]]:
    """Columns, and (rows, bytes) of each row group."""
    with storage.open_input(file.info.path) as handle:
        parquet = pq.ParquetFile(handle)
        columns = list(parquet.schema_arrow.names)
        _check_columns(file, section, columns)
        needed = set(needed_columns(section))
        sizes = []
        for index in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(index)
            leaves = [group.column(i) for i in range(group.num_columns)]
            num_bytes = sum(c.total_uncompressed_size for c in leaves if c.path_in_schema in needed or _top(c) in needed)
            sizes.append((group.num_rows, num_bytes))
    return columns, sizes


def _top(column: pq.ColumnChunkMetaData) -> str:
    return column.path_in_schema.split(".", 1)[0]


def _inspect_lines(file: CorpusFile, section: CorpusSection) -> tuple[list[str], list[tuple[int, int]]]:
    """Columns, and (rows, bytes) of the file's one unit."""
    path, compression = file.info.path, file.compression
    if file.format == "jsonl":
        columns = jsonl_columns(path, compression)
        num_rows = sum(1 for _ in iterate_lines(path, compression))
    else:
        read = read_rows(path, file.format, compression, 0, Selection())
        columns, num_rows = [name for name in read.table.column_names if name != ROW], read.num_rows
    if columns:
        _check_columns(file, section, columns)
    return columns, [(num_rows, file.info.size)]


def _check_columns(file: CorpusFile, section: CorpusSection, columns: Sequence[str]) -> None:
    missing = [name for name in needed_columns(section) if name not in columns]
    if missing:
        named = ", ".join(f"'{name}'" for name in missing)
        raise CorpusError(f"'{file.info.path}' has no column {named}; it has: {', '.join(columns)}")
    if len(set(columns)) != len(columns):
        raise CorpusError(f"'{file.info.path}' has two columns of one name: {', '.join(columns)}")


def _ids(file: CorpusFile, column: str, num_units: int) -> pa.Table:
    tables = []
    for row_group in range(num_units):
        selection = Selection((column,), text_columns=frozenset([column]))
        rows = read_rows(file.info.path, file.format, file.compression, row_group, selection).table
        if rows.num_rows == 0:
            continue
        found = [(i, row) for i, row in zip(ids_of(rows, column), rows.column(ROW).to_pylist(), strict=True) if i is not None]
        names = [name for name, _ in found]
        columns = {
            "id": pa.array(names, pa.string()),
            "file": pa.array([file.info.path] * len(found), pa.string()),
            "row_group": pa.array([row_group] * len(found), pa.int32()),
            "row": pa.array([row for _, row in found], pa.int64()),
        }
        tables.append(pa.table(columns, schema=IDS))
    return pa.concat_tables(tables) if tables else IDS.empty_table()
