"""`index`: what files there are, their row groups, sizes and etags, before anything else is read or loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from finescope import schemas, storage
from finescope.analysis.frames import scan
from finescope.config import CorpusSection
from finescope.corpus.files import CorpusFile, relative_names, resolve
from finescope.corpus.units import inspect_file
from finescope.errors import CorpusError, StepFailed
from finescope.manifest import TableFile
from finescope.runners.base import Context, Resources
from finescope.steps import Outcome, StepInput

_IDS = "ids"


@dataclass(frozen=True)
class _Inspect:
    """Looks at one file of the corpus; the table worker of this step."""

    files: tuple[CorpusFile, ...]
    section: CorpusSection
    uri: str

    def __call__(self, batch: pa.Table) -> pa.Table:
        number = batch.column("unit")[0].as_py()
        found = inspect_file(self.files[number], self.section)
        if found.ids is not None:
            storage.put_parquet(storage.join(self.uri, _IDS, f"part-{number:06d}.parquet"), found.ids)
        row = {"unit": number, "documents": found.documents.to_pylist(), "rejects": found.rejects.to_pylist()}
        return pa.Table.from_pylist([row], schema=_INSPECTED)


_INSPECTED = pa.schema(
    [
        ("unit", pa.int64()),
        ("documents", pa.list_(pa.struct(list(schemas.DOCUMENTS)))),
        ("rejects", pa.list_(pa.struct(list(schemas.REJECTS)))),
    ]
)


def index(context: Context, section: CorpusSection, step: StepInput) -> Outcome:
    """List the corpus. Rows are units of work: row groups of Parquet files, or whole line files.

    Raises:
        CorpusError: no file matches, a column is missing, or two documents have the same id.
        StepFailed: no file can be read, or more than `max_reject_rate` of them cannot.
    """
    files = tuple(resolve(section))
    storage.delete(storage.join(step.uri, _IDS))
    units = pa.table({"unit": pa.array(range(len(files)), pa.int64())})
    inspected: list[dict[str, Any]] = []
    with context.reporter.task("index", len(files), "files") as progress:
        arguments = (files, section, step.uri)
        for table in context.runner.map(_Inspect, arguments, units, Resources(accelerator=False)):
            inspected.extend(table.to_pylist())
            progress(table.num_rows)
    inspected.sort(key=lambda row: row["unit"])
    documents = [unit for row in inspected for unit in row["documents"]]
    rejects = [reject for row in inspected for reject in row["rejects"]]
    _check_rate(len(files), rejects, section.max_reject_rate)
    if section.id is not None:
        try:
            _refuse_duplicates(storage.join(step.uri, _IDS), section.id)
        finally:
            storage.delete(storage.join(step.uri, _IDS))
    tables = {
        "documents": _write(step.uri, "documents", documents, schemas.DOCUMENTS),
        "rejects": _write(step.uri, "rejects", rejects, schemas.REJECTS),
    }
    rows = sum(unit["num_rows"] for unit in documents)
    names = dict(zip((file.info.path for file in files), relative_names(files), strict=True))
    facts = {"files": len(files), "names": names, "documents": rows if section.limit is None else min(rows, section.limit)}
    units_in = len(documents) + len(rejects)
    return Outcome(units_in, len(documents), len(rejects), tables, facts)


def _write(uri: str, name: str, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> tuple[TableFile, ...]:
    path = f"{name}/part-000000.parquet"
    size = storage.put_parquet(storage.join(uri, path), pa.Table.from_pylist(list(rows), schema=schema))
    return (TableFile(path=path, rows=len(rows), bytes=size),)


def _check_rate(files: int, rejects: Sequence[dict[str, Any]], most: float) -> None:
    if not rejects:
        return
    first = rejects[0]
    example = f"{first['file']}: {first['reason']}: {first['detail']}"
    if len(rejects) == files:
        raise StepFailed(f"no file of the corpus can be read; the first: {example}")
    # A share of files means little for a handful of them: one broken file of ten must not stop a run.
    if files >= 1 / max(most, 1e-9) and len(rejects) / files > most:
        raise StepFailed(f"{len(rejects)} of {files} files cannot be read (max_reject_rate {most}); the first: {example}")


def _refuse_duplicates(directory: str, column: str) -> None:
    files = [storage.join(directory, name) for name in storage.list_names(directory)]
    if not files:
        return
    twice = scan(files).group_by("id").agg(pl.len().alias("times")).filter(pl.col("times") > 1)
    count = twice.select(pl.len()).collect().item()
    if count:
        examples = twice.sort("id").head(3).collect().rows()
        shown = ", ".join(f"'{doc_id}' ({times} times)" for doc_id, times in examples)
        raise CorpusError(f"corpus.id: column '{column}' is not unique: {count} ids stand more than once, such as {shown}")
