"""Units of work that a step has done: a shard of its table, one of its rejects, and last a record that makes them count.

No torch: an actor that needs none starts in no time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from finescope import storage
from finescope.errors import StepFailed
from finescope.manifest import TableFile
from finescope.runners.base import Context, Resources, TableWorker

Record = dict[str, Any]

_RECORDS = "units"
# What is kept of a unit: an object of JSON on storage, a row of this, and of what else a step knows of it, from the worker.
_RECORD = [
    *((name, pa.int64()) for name in ("unit", "rows_in", "rows", "rejects")),
    ("reasons", pa.map_(pa.string(), pa.int64())),
    *((name, pa.int64()) for name in ("rejects_bytes", "bytes")),
]
# Records of an earlier attempt that are read at a time: each is a request to an object store.
_READERS = 32


def write_unit(
    uri: str, unit: int, name: str, table: pa.Table, rejects: pa.Table, rows_in: int, **known: int | float
) -> pa.Table:
    """Shards of table `name` and of its rejects first, the record that makes them count last; returns it as a row.

    A unit done twice writes the same bytes to the same names.
    """
    rejects_bytes = storage.put_parquet(storage.join(uri, shard_of("rejects", unit)), rejects) if rejects.num_rows else 0
    record = {
        "unit": unit,
        "rows_in": rows_in,
        "rows": table.num_rows,
        "rejects": rejects.num_rows,
        "reasons": dict(sorted(Counter(rejects.column("reason").to_pylist()).items())),
        "rejects_bytes": rejects_bytes,
        "bytes": storage.put_parquet(storage.join(uri, shard_of(name, unit)), table),
        **known,
    }
    storage.put_json(storage.join(uri, _RECORDS, f"{unit:06d}.json"), record)
    kinds = [(key, pa.int64() if isinstance(value, int) else pa.float64()) for key, value in known.items()]
    return pa.Table.from_pylist([record], schema=pa.schema([*_RECORD, *kinds]))


def map_units(
    context: Context,
    name: str,
    worker: Callable[..., TableWorker],
    arguments: tuple[Any, ...],
    units: Sequence[Mapping[str, Any]],
    resources: Resources,
    uri: str,
    documents: int,
) -> list[Record]:
    """The records of `units` in their order; those that an earlier attempt has at `uri` are not done again.

    Args:
        name: of the task, as it is reported, of about so many `documents`.
        worker: writes the unit of number `unit` by `write_unit`.
    """
    there = {int(found.removesuffix(".json")) for found in storage.list_names(storage.join(uri, _RECORDS))}
    left = pa.Table.from_pylist([unit for unit in units if unit["unit"] not in there])
    with context.reporter.task(name, documents, "documents") as progress:
        records = records_at(uri, [unit["unit"] for unit in units if unit["unit"] in there])
        progress(sum(record["rows_in"] for record in records))
        for table in context.runner.map(worker, arguments, left, resources):
            (record,) = table.to_pylist(maps_as_pydicts="strict")
            records.append(record)
            progress(record["rows_in"])
    # Sums of floats depend on the order, and units come in any.
    return sorted(records, key=lambda record: record["unit"])


def records_at(uri: str, units: Iterable[int]) -> list[Record]:
    """The records of units that are done, in order."""
    paths = [storage.join(uri, _RECORDS, f"{unit:06d}.json") for unit in units]
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(storage.read_json, paths))


def total(records: Iterable[Record], name: str) -> int:
    """The sum of what all records say."""
    return sum(record[name] for record in records)


def shard_of(name: str, unit: int) -> str:
    """Where the shard of a unit is, below the directory that `write_unit` wrote into."""
    return f"{name}/part-{unit:06d}.parquet"


def shards(records: Iterable[Record], name: str) -> tuple[TableFile, ...]:
    """The files of table `name` that `write_unit` wrote."""
    return tuple(TableFile(path=shard_of(name, r["unit"]), rows=r["rows"], bytes=r["bytes"]) for r in records)


def below(folder: str, files: Iterable[TableFile]) -> tuple[TableFile, ...]:
    """Files of a table that `write_unit` wrote into a folder of the step's directory, as the manifest names them."""
    return tuple(file.model_copy(update={"path": f"{folder}/{file.path}"}) for file in files)


def rejected(records: Iterable[Record]) -> tuple[TableFile, ...]:
    """The files of the rejects."""
    return tuple(
        TableFile(path=shard_of("rejects", record["unit"]), rows=record["rejects"], bytes=record["rejects_bytes"])
        for record in records
        if record["rejects"]
    )


def check_rate(records: Sequence[Record], most: float) -> None:
    """Hold the rejects to `corpus.max_reject_rate`.

    Raises:
        StepFailed: there is no row, all of them or too many are rejected; the message names the leading reason.
    """
    rows, rejects = total(records, "rows_in"), total(records, "rejects")
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record["reasons"])
    if rows == 0:
        raise StepFailed("the corpus has no row")
    if rejects / rows > most:
        leading = max(reasons, key=lambda reason: (reasons[reason], reason))
        raise StepFailed(
            f"{rejects:,} of {rows:,} rows are rejected, more than corpus.max_reject_rate ({most}) allows; "
            f"{reasons[leading]:,} of them: {leading}"
        )
    if rejects == rows:
        raise StepFailed("every row of the corpus is rejected")
