"""The inputs of the demo, made from what is installed: a corpus, ten seeds, and two held-out sets taken out first."""

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from finescope import storage
from finescope.corpus.python_docs import collect
from finescope.errors import ResourceError
from finescope.runners.base import Reporter

TARGET = "sympy"
# Documents a package at most; the target's share of the corpus stays below a quarter.
PACKAGES = {
    "sympy": 570,
    "numpy": 260,
    "torch": 260,
    "transformers": 260,
    "ray": 220,
    "pandas": 260,
    "polars": 220,
    "networkx": 260,
    "datasets": 120,
    "pydantic": 80,
    "accelerate": 80,
    "fsspec": 60,
    "stdlib": 260,
}
_SEEDS = 10
_HELD_OUT = 60
_FEWEST = 2000
_ROWS_PER_GROUP = 250
_GROUPS_PER_FILE = 2


def prepare(uri: str, reporter: Reporter) -> None:
    """Write `corpus/*.parquet` (id, name, text, source), `seeds.jsonl`, `target.jsonl` and `general.jsonl` at `uri`, once.

    Raises:
        ResourceError: too few of the packages are installed with their sources.
    """
    record = storage.join(uri, "prepared.json")
    if storage.exists(record):
        return
    with reporter.task("inputs: documentation", len(PACKAGES), "packages") as progress:
        table, missing = collect(PACKAGES, seed=0, progress=progress)
    if missing:
        reporter.warn(f"without the documentation of {', '.join(missing)}: not installed")
    is_target = pc.equal(table.column("source"), TARGET)
    target, other = table.filter(is_target), table.filter(pc.invert(is_target))
    if target.num_rows < 4 * _HELD_OUT or table.num_rows < _FEWEST:
        raise ResourceError(
            f"the demo needs {_FEWEST} documents and {4 * _HELD_OUT} of '{TARGET}'; {table.num_rows} and {target.num_rows} "
            f"were found; install {', '.join(PACKAGES)}"
        )
    put_rows(storage.join(uri, "seeds.jsonl"), target.slice(0, _SEEDS))
    put_rows(storage.join(uri, "target.jsonl"), target.slice(_SEEDS, _HELD_OUT))
    put_rows(storage.join(uri, "general.jsonl"), other.slice(0, _HELD_OUT))
    rest = pa.concat_tables([target.slice(_SEEDS + _HELD_OUT), other.slice(_HELD_OUT)]).sort_by("id")
    size = _ROWS_PER_GROUP * _GROUPS_PER_FILE
    for number, start in enumerate(range(0, rest.num_rows, size)):
        path = storage.join(uri, "corpus", f"part-{number:02d}.parquet")
        storage.put_parquet(path, rest.slice(start, size), row_group_size=_ROWS_PER_GROUP)
    counts = {row["values"]: row["counts"] for row in pc.value_counts(rest.column("source")).to_pylist()}
    storage.put_json(record, {"target": TARGET, "documents": rest.num_rows, "by_package": dict(sorted(counts.items()))})
    reporter.note(f"inputs: {rest.num_rows} documents of {len(counts)} packages, {counts[TARGET]} of them of '{TARGET}'")


def put_rows(uri: str, rows: pa.Table | Sequence[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    items = rows.to_pylist() if isinstance(rows, pa.Table) else rows
    storage.put_bytes(uri, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode())
