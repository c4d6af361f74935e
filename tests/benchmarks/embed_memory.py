"""Memory of driver and actors while `embed` goes over a million short documents on Ray. Prints JSON.

    OMP_NUM_THREADS=1 python tests/benchmarks/embed_memory.py

A random Llama of 3 blocks and a width of 32 (2 of them are run), documents of 8 words in files of 50,000 rows and row groups of
2,500; a whole run up to `embed`. Resident memory, and what of it is not shared with other processes (Ray's object store is),
of the driver and of the largest actor at every 100,000 documents that are done; the ratios are the largest over the first.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_run import COMMON, COOKING, MATHS, recipe_values, write_inputs

from finescope import pipeline
from finescope.config import Recipe
from finescope.runners.base import TrainProgress

WORDS = np.array([*COMMON, *MATHS, *COOKING])
ROWS_PER_FILE, ROWS_PER_GROUP, LENGTH = 50_000, 2_500, 8


def write_corpus(folder: Path, documents: int) -> None:
    """Random words, LENGTH a document."""
    random = np.random.default_rng(0)
    for file in folder.glob("*.parquet"):
        file.unlink()
    for number, start in enumerate(range(0, documents, ROWS_PER_FILE)):
        chosen = WORDS[random.integers(0, len(WORDS), (min(ROWS_PER_FILE, documents - start), LENGTH))]
        table = pa.table({"text": [" ".join(row) for row in chosen]})
        pq.write_table(table, folder / f"part-{number:04d}.parquet", row_group_size=ROWS_PER_GROUP)


class Watch:
    """Tells nothing; looks at the memory of this process and of the actors as `embed` goes on."""

    def __init__(self, every: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._every, self._done, self._began = every, 0, time.perf_counter()

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    @contextlib.contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[TrainProgress]:
        yield self._embedded if name == "embed" else lambda amount, note="", /: None

    def _embedded(self, amount: int, note: str = "", /) -> None:
        before, self._done = self._done // self._every, self._done + amount
        if self._done // self._every > before:
            self.look()

    def look(self) -> None:
        """Add a row: documents done, seconds since the beginning, MB of driver and largest actor."""
        found = {"driver": memory(os.getpid()), "actor": (0.0, 0.0)}
        for process in descendants(os.getpid()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{process}/cmdline").read_text().startswith("ray::Map"):
                    found["actor"] = max(found["actor"], memory(process))
        row: dict[str, Any] = {"documents": self._done, "seconds": time.perf_counter() - self._began}
        for name, (resident, own) in found.items():
            row |= {f"{name}_resident_mb": resident, f"{name}_own_mb": own}
        self.rows.append(row)


def memory(process: int) -> tuple[float, float]:
    """MB resident, and MB of that which are not shared."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
    page = os.sysconf("SC_PAGE_SIZE") / 1e6
    return resident * page, (resident - shared) * page


def descendants(ancestor: int) -> set[int]:
    """Processes that this one started, and that they did."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {ancestor}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--actors", type=int, default=1)
    arguments = parser.parse_args()
    import ray

    with tempfile.TemporaryDirectory(prefix="fs", dir="/tmp", ignore_cleanup_errors=True) as folder:
        root = write_inputs(Path(folder) / "inputs", documents=1)
        write_corpus(root / "corpus", arguments.documents)
        values = recipe_values(
            root, "run", corpus={"id": None}, embed={"max_tokens": 16, "keep_latents": 16, "batch_tokens": 1024}
        )
        recipe = Recipe.model_validate(values)
        pipeline.run(recipe, Watch(arguments.documents), "sae")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder + "/r")
        watch = Watch(100_000)
        on_ray = {"runner": "ray", "actors": arguments.actors, "memory_per_actor_gb": 0.1}
        done = pipeline.run(Recipe.model_validate({**values, "compute": on_ray}), watch, "embed")["embed"]
        ray.shutdown()
    first, figures = watch.rows[0], [name for name in watch.rows[0] if name.endswith("_mb")]
    ratios = {name: max(row[name] for row in watch.rows) / first[name] for name in figures}
    print(
        json.dumps(
            {"documents": done.rows_out, "seconds": done.seconds, "largest_to_first": ratios, "rows": watch.rows}, indent=2
        )
    )


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    main()
