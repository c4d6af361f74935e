"""What the stages share: the model of a run, the memory it takes, tables of one shard, and documents by locator."""

from collections.abc import Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from finescope import storage
from finescope.analysis.frames import frame_of
from finescope.config import CorpusSection
from finescope.corpus.documents import read_selected
from finescope.corpus.reading import concat_rows
from finescope.corpus.shapes import shaped_as_indexed
from finescope.manifest import Manifest, TableFile
from finescope.models.load import ModelReference, load_tokenizer
from finescope.runners.base import Context, Resources
from finescope.steps import StepInput

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A process with torch, transformers and a Ray worker in it, before any weight.
PROCESS_BYTES = 700_000_000


def model_of(manifest: Manifest) -> ModelReference:
    """The language model of a run, from its `model` step."""
    return ModelReference.model_validate(manifest.facts["reference"])


def memory_bytes(model: ModelReference, copies: float = 1.0) -> int:
    """Resident memory of a process that holds `copies` of the model's weights."""
    return PROCESS_BYTES + int(copies * model.num_parameters * bytes_per_parameter(model))


def bytes_per_parameter(model: ModelReference) -> int:
    """Bytes of one parameter."""
    return _BYTES[model.dtype]


def write_table(uri: str, name: str, table: pa.Table) -> tuple[TableFile, ...]:
    """Write a table as one shard."""
    path = f"{name}/part-000000.parquet"
    size = storage.put_parquet(storage.join(uri, path), table)
    return (TableFile(path=path, rows=table.num_rows, bytes=size),)


def read_shards(manifest: Manifest, name: str, columns: list[str] | None = None, most: int | None = None) -> pa.Table:
    """The first `most` rows of a table, or all, and no shard after them."""
    tables: list[pa.Table] = []
    for path in manifest.files(name):
        if most is not None and sum(table.num_rows for table in tables) >= most:
            break
        tables.append(storage.read_parquet(path, columns))
    return pa.concat_tables(tables).slice(0, most)


def corpus_of(section: CorpusSection, index: Manifest) -> CorpusSection:
    """The corpus as `index` found it: with the shape of its rows where the recipe names no columns."""
    return shaped_as_indexed(section, index.facts)


def index_units(index: Manifest) -> list[dict[str, Any]]:
    """The units of the corpus in order: rows of `documents` with `unit`, and `file_index`, the number of the file."""
    (path,) = index.files("documents")
    rows = storage.read_parquet(path).to_pylist()
    numbers = {file: number for number, file in enumerate(dict.fromkeys(row["file"] for row in rows))}
    return [row | {"unit": unit, "file_index": numbers[row["file"]]} for unit, row in enumerate(rows)]


def limited_units(index: Manifest, limit: int | None) -> list[dict[str, Any]]:
    """The units with `take`, the rows of each that are read, and `name`, the file's name in ids."""
    directory: str = index.facts["directory"]
    left = limit
    units = []
    for unit in index_units(index):
        take = unit["num_rows"] if left is None else min(left, unit["num_rows"])
        left = None if left is None else left - take
        units.append(unit | {"take": take, "name": unit["file"].removeprefix(directory)})
    return units


class _Select:
    """Reads some rows of one unit; the table worker behind `read_located`."""

    def __init__(self, section: CorpusSection, model: ModelReference) -> None:
        self._section = section
        self._tokenizer = load_tokenizer(model) if section.messages else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        table = read_selected(unit, unit["rows"], self._section, self._tokenizer)
        unit_column = pa.array([unit["unit"]] * table.num_rows, pa.int64())
        return table.append_column("__unit", unit_column)


def read_located(
    context: Context, index: Manifest, model: ModelReference, section: CorpusSection, located: pl.DataFrame, name: str
) -> pa.Table:
    """Read the source rows that `located` (file, row_group, row) names, in its order, all columns and `text`.

    Only the row groups that hold one of them are opened.
    """
    units = {(unit["file_index"], unit["row_group"]): unit for unit in index_units(index)}
    wanted: dict[int, dict[str, Any]] = {}
    for file, row_group, row in located.select("file", "row_group", "row").iter_rows():
        unit = units[file, row_group]
        wanted.setdefault(unit["unit"], unit | {"rows": []})["rows"].append(row)
    tables = []
    with context.reporter.task(name, located.height, "documents") as progress:
        # In order: of a compressed file the units are found by who goes forward, and each step back reads it anew.
        work = pa.Table.from_pylist([wanted[unit] for unit in sorted(wanted)])
        for table in context.runner.map(_Select, (section, model), work, Resources(accelerator=False)):
            tables.append(table)
            progress(table.num_rows)
    if not tables:
        return pa.table({"text": pa.array([], pa.string())})
    read = concat_rows(tables)
    places = {place: at for at, place in enumerate(zip(_ints(read, "__unit"), _ints(read, "__row"), strict=True))}
    order = [
        places[units[file, row_group]["unit"], row]
        for file, row_group, row in located.select("file", "row_group", "row").iter_rows()
    ]
    return read.take(pa.array(order, pa.int64())).drop_columns(["__unit", "__row"])


def random_documents(step: StepInput, count: int, seed: int, without: Sequence[str]) -> pl.DataFrame:
    """A uniform sample of the corpus's documents (doc_id, file, row_group, row) that are not in `without`.

    Of those that `embed` embedded; behind a screen, of the screen's own sample, as the others are no longer any documents of
    the corpus. The order is that of a hash of id and seed, so that it depends on neither shards nor runners.
    """
    drawn_from = frame_of(step["screen"], "sampled") if "screen" in step.inputs else frame_of(step["embed"], "embeddings")
    frame = drawn_from.select("doc_id", "file", "row_group", "row", "num_tokens")
    frame = frame.filter(~pl.col("doc_id").is_in(list(without)))
    frame = frame.with_columns(pl.col("doc_id").hash(seed).alias("draw"))
    return frame.bottom_k(count, by=["draw", "doc_id"]).collect().sort(["draw", "doc_id"]).drop("draw")


def _ints(table: pa.Table, name: str) -> list[int]:
    return table.column(name).to_pylist()
