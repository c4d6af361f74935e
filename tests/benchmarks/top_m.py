"""The exact best M of generated scores: seconds and peak memory of the process that selects. Prints JSON.

    python tests/benchmarks/top_m.py --rows 100000000 --most 1000000

Shards of the `scores` table are generated first, which is not timed; the page cache is as generating left it. The process
that selects is one of its own; its peak resident memory is what the system says when it ends. That the result is exact is
checked on a smaller number of rows against a sort of all of them.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from finescope import schemas, storage
from finescope.curation.ranking import Eligible, Ranking

TOP_LATENTS = 8


def write_shard(root: str, number: int, rows: int) -> str:
    """One shard: ids of 16 hex digits, scores as of cosines rounded so that there are ties, locators of 10,000 rows a group."""
    random = np.random.default_rng(number)
    scores = np.round(np.tanh(random.normal(0.15, 0.12, rows)), 5)
    ids = np.frombuffer(random.bytes(8 * rows).hex().encode(), dtype="S16")
    place = np.arange(rows)
    columns = {
        "doc_id": pa.array(ids.astype("U16")),
        "file": pa.array(np.full(rows, number)),
        "row_group": pa.array(place // 10_000),
        "row": pa.array(place % 10_000),
        "num_tokens": pa.array(random.integers(2, 513, rows)),
        "score": pa.array(scores.astype(np.float32)),
        "seed": pa.array(random.integers(0, 10, rows)),
        "top_latents": pa.FixedSizeListArray.from_arrays(pa.array(random.integers(0, 4096, rows * TOP_LATENTS)), TOP_LATENTS),
    }
    arrays = [columns[field.name].cast(field.type) for field in schemas.SCORES]
    path = storage.join(root, f"part-{number:06d}.parquet")
    storage.put_parquet(path, pa.table(arrays, schema=schemas.SCORES))
    return path


def digest(frame: pl.DataFrame) -> str:
    """Of the ids in their order."""
    return hashlib.sha256("\n".join(frame["doc_id"]).encode()).hexdigest()[:16]


def select(files: list[str], most: int) -> None:
    """Select, and print what it took."""
    started = time.perf_counter()
    ranking = Ranking.of(files, Eligible())
    counted = time.perf_counter()
    found = ranking.best(most)
    ended = time.perf_counter()
    print(
        json.dumps(
            {
                "seconds": round(ended - started, 2),
                "seconds_of_first_pass": round(counted - started, 2),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                "rows_kept": found.height,
                "lowest_score": float(found["score"][-1]),
                "digest": digest(found),
            }
        )
    )


def measured(files: list[str], most: int, listing: Path) -> dict[str, Any]:
    """`select` in a process of its own."""
    listing.write_text("\n".join(files))
    command = [sys.executable, __file__, "--select", str(listing), "--most", str(most)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def sorted_whole(files: list[str], most: int) -> str:
    """The same by a sort of everything, in Arrow."""
    table = pa.concat_tables(storage.read_parquet(path, ["doc_id", "score"]) for path in files)
    found = pl.DataFrame(table.sort_by([("score", "descending"), ("doc_id", "ascending")]).slice(0, most))
    return digest(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--shard-rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", help="where the shards are generated; a temporary directory by default")
    parser.add_argument("--select", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.select:
        select(Path(arguments.select).read_text().split("\n"), arguments.most)
        return
    with tempfile.TemporaryDirectory(prefix="top-m-", dir=arguments.directory) as root:
        shards = range(-(-arguments.rows // arguments.shard_rows))
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(write_shard, root, number, arguments.shard_rows) for number in shards]
            files = [job.result() for job in jobs]
        size = sum(os.path.getsize(file) for file in files)
        few = files[:5]
        fraction = max(arguments.most // 20, 1)
        small = measured(few, fraction, Path(root) / "few")
        runs = [measured(files, arguments.most, Path(root) / "all") for _ in range(arguments.repeats)]
        print(
            json.dumps(
                {
                    "rows": len(files) * arguments.shard_rows,
                    "files": len(files),
                    "gigabytes": round(size / 1e9, 2),
                    "cores": len(os.sched_getaffinity(0)),
                    "exact_on_rows": len(few) * arguments.shard_rows,
                    "exact": small["digest"] == sorted_whole(few, fraction),
                    "same_result_each_time": len({run["digest"] for run in runs}) == 1,
                    "median_seconds": sorted(float(run["seconds"]) for run in runs)[len(runs) // 2],
                    "largest_peak_gib": max(float(run["peak_gib"]) for run in runs),
                    "runs": runs,
                    "versions": {"python": platform.python_version(), "pyarrow": pa.__version__, "polars": pl.__version__},
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
