"""`index`: what files there are, their units, sizes and etags, before anything else is read or loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from finescope import schemas, storage
from finescope.config import CorpusSection
from finescope.corpus.files import CorpusFile, common_directory, format_of, resolve
from finescope.corpus.hub import commits_of
from finescope.corpus.shapes import recognise, shaped
from finescope.corpus.units import Inspection, inspect_range, num_ranges, range_bytes
from finescope.errors import CorpusError, StepFailed
from finescope.manifest import TableFile
from finescope.runners.base import Context, Resources
from finescope.stages.repeated_ids import repeated_ids
from finescope.steps import Outcome, StepInput
from finescope.storage import FileInfo

_IDS = "ids"
# To open a file costs as much as to read so many bytes: of small files a task looks at many.
_OPENING_BYTES = 1 << 20
_TASK_BYTES = 1 << 26
# Ranges that wait as Python's objects: of one alone Arrow's buffers are ten times what is in them.
_PACKED_RANGES = 4096
_RANGE = pa.struct([("path", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("range", pa.int32())])
_TASKS = pa.schema([("task", pa.int64()), ("ranges", pa.list_(_RANGE))])
_FOUND = pa.schema(
    [
        ("task", pa.int64()),
        ("ranges", pa.int64()),
        ("documents", pa.list_(pa.struct(list(schemas.DOCUMENTS)))),
        ("rejects", pa.list_(pa.struct(list(schemas.REJECTS)))),
    ]
)


@dataclass(frozen=True)
class _Inspect:
    """Looks at some files of the corpus, or at ranges of them; the table worker of this step."""

    section: CorpusSection
    uri: str

    def __call__(self, batch: pa.Table) -> pa.Table:
        (task,) = batch.to_pylist()
        found = [self._inspect(entry) for entry in task["ranges"]]
        ids = [item.ids for item in found if item.ids is not None]
        if ids:
            storage.put_parquet(storage.join(self.uri, _IDS, f"part-{task['task']:06d}.parquet"), pa.concat_tables(ids))
        documents = pa.concat_tables([item.documents for item in found]).to_pylist()
        rejects = pa.concat_tables([item.rejects for item in found]).to_pylist()
        row = {"task": task["task"], "ranges": len(found), "documents": documents, "rejects": rejects}
        return pa.Table.from_pylist([row], schema=_FOUND)

    def _inspect(self, entry: dict[str, Any]) -> Inspection:
        info = FileInfo(entry["path"], entry["size"], entry["etag"])
        return inspect_range(CorpusFile(info, *format_of(info.path, self.section.format)), self.section, entry["range"])


def index(context: Context, section: CorpusSection, step: StepInput) -> Outcome:
    """List the corpus. Rows are units of work: row groups of Parquet files, ranges of JSONL files, other files whole.

    Raises:
        CorpusError: no file matches, a column is missing, or two documents have the same id.
        StepFailed: no file can be read, or more than `max_reject_rate` of them cannot.
    """
    files = resolve(section)
    shape = recognise(section, files)
    if shape is not None:
        made_of = f"corpus.messages: {shape.messages}" if shape.messages else f"corpus.text: {shape.text!r}"
        context.reporter.note(f"index: the corpus has no column 'text' and is read as {shape.name}, as by {made_of}")
    section = shaped(section, shape)
    storage.delete(storage.join(step.uri, _IDS))
    tasks = _tasks(files, section)
    found: list[pa.Table] = []
    with context.reporter.task("index", sum(num_ranges(file, section) for file in files), "files and ranges") as progress:
        for table in context.runner.map(_Inspect, (section, step.uri), tasks, Resources(accelerator=False)):
            found.append(table)
            progress(sum(table.column("ranges").to_pylist()))
    inspected = pa.concat_tables(found).sort_by("task")
    documents = _flattened(inspected, "documents", schemas.DOCUMENTS)
    rejects = _flattened(inspected, "rejects", schemas.REJECTS)
    _check_rate(len(files), rejects, section.max_reject_rate)
    if section.id is not None:
        try:
            _refuse_duplicates(step.uri, section.id)
        finally:
            storage.delete(storage.join(step.uri, _IDS))
    tables = {
        "documents": _write(step.uri, "documents", documents),
        "rejects": _write(step.uri, "rejects", rejects),
    }
    rows = sum(documents.column("num_rows").to_pylist())
    facts = {
        "files": len(files),
        "directory": common_directory(files),
        "commits": commits_of(file.info.path for file in files),
        "documents": rows if section.limit is None else min(rows, section.limit),
        "shape": shape and shape._asdict(),
    }
    return Outcome(documents.num_rows + rejects.num_rows, documents.num_rows, rejects.num_rows, tables, facts)


def _tasks(files: Sequence[CorpusFile], section: CorpusSection) -> pa.Table:
    """Rows of _TASKS, each as much as an actor takes at a time: files and ranges in order, to a number of bytes that are read."""
    packed: list[pa.RecordBatch] = []
    loose: list[dict[str, Any]] = []
    held = 0
    for number, ranges in enumerate(_ranges(files, section)):
        loose.append({"task": number, "ranges": ranges})
        held += len(ranges)
        if held >= _PACKED_RANGES:
            packed.append(pa.RecordBatch.from_pylist(loose, schema=_TASKS))
            loose, held = [], 0
    return pa.Table.from_batches([*packed, pa.RecordBatch.from_pylist(loose, schema=_TASKS)], schema=_TASKS)


def _ranges(files: Sequence[CorpusFile], section: CorpusSection) -> Iterator[list[dict[str, Any]]]:
    """The ranges of each task."""
    size = range_bytes(section)
    ranges: list[dict[str, Any]] = []
    cost = 0
    for file in files:
        info, count = file.info, num_ranges(file, section)
        whole = info.size or 0
        read = 0 if file.format == "parquet" and section.id is None else min(whole, size if count > 1 else whole)
        for number in range(count):
            if ranges and cost + read + _OPENING_BYTES > _TASK_BYTES:
                yield ranges
                ranges, cost = [], 0
            ranges.append({"path": info.path, "size": info.size, "etag": info.etag, "range": number})
            cost += read + _OPENING_BYTES
    yield ranges


def _flattened(table: pa.Table, name: str, schema: pa.Schema) -> pa.Table:
    """The structs of all lists of a column as a table."""
    chunks = [chunk.flatten() for chunk in table.column(name).chunks]
    return pa.concat_tables([schema.empty_table(), *(pa.Table.from_struct_array(chunk).cast(schema) for chunk in chunks)])


def _write(uri: str, name: str, table: pa.Table) -> tuple[TableFile, ...]:
    path = f"{name}/part-000000.parquet"
    size = storage.put_parquet(storage.join(uri, path), table)
    return (TableFile(path=path, rows=table.num_rows, bytes=size),)


def _check_rate(files: int, rejects: pa.Table, most: float) -> None:
    if not rejects.num_rows:
        return
    (first,) = rejects.slice(0, 1).to_pylist()
    example = f"{first['file']}: {first['reason']}: {first['detail']}"
    if rejects.num_rows == files:
        raise StepFailed(f"no file of the corpus can be read; the first: {example}")
    # A share of files means little for a handful of them: one broken file of ten must not stop a run.
    if files >= 1 / max(most, 1e-9) and rejects.num_rows / files > most:
        raise StepFailed(f"{rejects.num_rows} of {files} files cannot be read (max_reject_rate {most}); the first: {example}")


def _refuse_duplicates(uri: str, column: str) -> None:
    count, examples = repeated_ids(storage.join(uri, _IDS))
    if count:
        shown = ", ".join(f"'{doc_id}' ({times} times)" for doc_id, times in examples)
        raise CorpusError(f"corpus.id: column '{column}' is not unique: {count} ids stand more than once, such as {shown}")
