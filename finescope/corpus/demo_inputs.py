"""The inputs of the demo, made from what is installed: a corpus, ten seeds, and two held-out sets taken out first."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa

from finescope import storage
from finescope.corpus.python_docs import collect
from finescope.errors import ResourceError
from finescope.runners.base import Reporter

TARGET = "sympy"
# Documents a package at most; the target's share of the corpus stays below a quarter.
PACKAGES = {
    "sympy": 450,
    "numpy": 200,
    "torch": 200,
    "transformers": 200,
    "ray": 160,
    "pandas": 200,
    "polars": 160,
    "networkx": 200,
    "datasets": 80,
    "pydantic": 60,
    "accelerate": 60,
    "fsspec": 40,
    "stdlib": 200,
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
    is_target = np.array(table.column("source").to_pylist()) == TARGET
    # An id is a hash: in its order the general set is drawn from all packages alike.
    target, other = table.filter(pa.array(is_target)), table.filter(pa.array(~is_target)).sort_by("id")
    if target.num_rows < 4 * _HELD_OUT or table.num_rows < _FEWEST:
        raise ResourceError(
            f"the demo needs {_FEWEST} documents and {4 * _HELD_OUT} of '{TARGET}'; {table.num_rows} and {target.num_rows} "
            f"were found; install {', '.join(PACKAGES)}"
        )
    _put_lines(storage.join(uri, "seeds.jsonl"), target.slice(0, _SEEDS))
    _put_lines(storage.join(uri, "target.jsonl"), target.slice(_SEEDS, _HELD_OUT))
    _put_lines(storage.join(uri, "general.jsonl"), other.slice(0, _HELD_OUT))
    rest = pa.concat_tables([target.slice(_SEEDS + _HELD_OUT), other.slice(_HELD_OUT)]).sort_by("id")
    size = _ROWS_PER_GROUP * _GROUPS_PER_FILE
    for number, start in enumerate(range(0, rest.num_rows, size)):
        path = storage.join(uri, "corpus", f"part-{number:02d}.parquet")
        storage.put_parquet(path, rest.slice(start, size), row_group_size=_ROWS_PER_GROUP)
    counts = Counter(rest.column("source").to_pylist())
    storage.put_json(record, {"target": TARGET, "documents": rest.num_rows, "by_package": dict(sorted(counts.items()))})
    reporter.note(f"inputs: {rest.num_rows} documents of {len(counts)} packages, {counts[TARGET]} of them of '{TARGET}'")


def _put_lines(uri: str, rows: pa.Table) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist()]
    storage.put_bytes(uri, "".join(lines).encode())
