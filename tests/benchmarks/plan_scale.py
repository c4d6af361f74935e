"""What a driver needs at 10^9 documents: memory and seconds of all that it does unit by unit. Prints JSON.

    python tests/benchmarks/plan_scale.py --units 60000 --documents 1000000000

There is a run whose index lists so many units, ranges of 32 MiB of JSONL files, and no data: the tables and records are as the
steps write them, and a runner stands in for actors that answers at once. Each measurement is a process of its own, forked where
all is imported; `growth` is its peak of resident memory less what it had before.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli_runs import SilentReporter
from curate_inputs import REFERENCE
from tiny_run import tiny_recipe, write_inputs

from finescope import pipeline, schemas, steps, storage
from finescope.config import CorpusSection, EmbedSection, Recipe, SaeSection
from finescope.corpus.files import CorpusFile
from finescope.manifest import Manifest, TableFile, read_manifest
from finescope.plan import costs
from finescope.runners.base import Context
from finescope.stages.embed import embed
from finescope.stages.index import _tasks
from finescope.stages.references import limited_units
from finescope.stages.sae import _documents
from finescope.stages.units import _RECORD
from finescope.steps import Outcome, Step, StepInput
from finescope.storage import FileInfo

RANGE, RANGES_A_FILE = 32 * 2**20, 1000
ANSWER = pa.schema([*_RECORD, ("tokens", pa.int64()), ("fvu_sum", pa.float64())])
CORPUS = CorpusSection.model_validate({"path": ["s3://bucket/corpus/*.jsonl"], "id": "id"})


def records(units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What actors of `embed` would answer."""
    counts = {"reasons": {"too_long": 3}, "tokens": 10**6, "fvu_sum": 4000.125, "rejects_bytes": 4321, "bytes": 12_345_678}
    return [{"unit": unit["unit"], "rows_in": unit["take"], "rows": unit["take"] - 3, "rejects": 3, **counts} for unit in units]


class Answering:
    """A runner whose actors have nothing to do."""

    def map(self, worker: object, arguments: object, rows: pa.Table, resources: object) -> Iterator[pa.Table]:
        """See `Runner`: a row in, a row out."""
        for start in range(rows.num_rows):
            yield pa.Table.from_pylist(records(rows.slice(start, 1).to_pylist()), schema=ANSWER)


def write_run(root: Path, recipe: Recipe, units: int, documents: int) -> None:
    """Steps `index` to `sae`, done, and half of the records of `embed`."""
    rows = documents // units
    places = [divmod(unit, RANGES_A_FILE) for unit in range(units)]
    table = pa.table(
        {
            "file": [f"s3://bucket/corpus/part-{file:05d}.jsonl" for file, _ in places],
            "row_group": pa.array([number for _, number in places], pa.int32()),
            "num_rows": pa.array([rows] * units, pa.int64()),
            "bytes": pa.array([RANGE - number % 997 for _, number in places], pa.int64()),
            "etag": [f"{file:032x}" for file, _ in places],
            "start": pa.array([number * RANGE + number % 991 for _, number in places], pa.int64()),
        },
        schema=schemas.DOCUMENTS,
    )

    def index(step: StepInput) -> Outcome:
        path = "documents/part-000000.parquet"
        size = storage.put_parquet(storage.join(step.uri, path), table)
        tables = {"documents": (TableFile(path=path, rows=units, bytes=size),), "rejects": ()}
        return Outcome(units, units, 0, tables, {"directory": "s3://bucket/corpus/", "shape": None})

    plan, output = pipeline.steps_of(recipe), recipe.output
    steps.run(plan["index"], output, index)
    steps.run(plan["model"], output, lambda step: Outcome(facts={"reference": REFERENCE}))
    steps.run(plan["sae"], output, lambda step: Outcome(facts={"num_latents": 4096}))
    (root / "run" / "embed" / "units").mkdir(parents=True)
    for unit in range(0, units, 2):
        (record,) = records([{"unit": unit, "take": rows}])
        (root / "run" / "embed" / "units" / f"{unit:06d}.json").write_text(json.dumps(record, indent=2))


def inputs_of(recipe: Recipe) -> tuple[dict[str, Step], StepInput]:
    plan = pipeline.steps_of(recipe)
    done = {name: _done(recipe, name) for name in ("index", "model", "sae")}
    return plan, StepInput(storage.join(recipe.output, "embed"), plan["embed"].identity, done)


def _done(recipe: Recipe, name: str) -> Manifest:
    found = read_manifest(storage.join(recipe.output, name))
    assert found is not None, name
    return found


def resumed(recipe: Recipe) -> object:
    """`embed` begins again: all units and records are read, the other half is handed out, the manifest written and read."""
    plan, step = inputs_of(recipe)
    context = Context(Answering(), SilentReporter())  # pyright: ignore[reportArgumentType]
    outcome = embed(context, CORPUS, EmbedSection(), step)
    return steps.run(plan["embed"], recipe.output, lambda _: outcome)


MEASURED: dict[str, Callable[[Recipe, int], object]] = {
    "index: tasks of the ranges": lambda recipe, units: _tasks(_files(units, True), CORPUS),
    "index: tasks of as many small files": lambda recipe, units: _tasks(_files(units, False), CORPUS),
    "units": lambda recipe, units: limited_units(_done(recipe, "index"), None),
    "plan": lambda recipe, units: costs(recipe),
    "sae: chunks of 2,000,000 tokens": lambda recipe, units: _documents(inputs_of(recipe)[1], CORPUS, SaeSection()),
    "embed: half is done, the rest handed out": lambda recipe, units: resumed(recipe),
    "embed: its manifest read": lambda recipe, units: _done(recipe, "embed"),
}


def _files(units: int, large: bool) -> list[CorpusFile]:
    whole, rest = divmod(units, RANGES_A_FILE)
    sizes = [RANGES_A_FILE * RANGE] * whole + [rest * RANGE] * (rest > 0) if large else [10_000] * units
    infos = [FileInfo(f"s3://bucket/corpus/part-{number:06d}.jsonl", size, f"{number:032x}") for number, size in enumerate(sizes)]
    return [CorpusFile(info, "jsonl", None) for info in infos]


def memory(key: str) -> int:
    """Bytes, as the system tells them of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(key)


def measure(name: str, folder: str, units: int) -> dict[str, Any]:
    """One of `MEASURED`, in this process."""
    recipe = _recipe(Path(folder))
    before, started, cpu = memory("VmRSS"), time.monotonic(), time.process_time()
    held = MEASURED[name](recipe, units)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    growth = memory("VmHWM") - before
    del held
    return {"what": name, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "growth": growth, "before": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=60_000)
    parser.add_argument("--documents", type=int, default=1_000_000_000)
    arguments = parser.parse_args()
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["finescope.plan", "finescope.stages.embed", "finescope.stages.sae", "tiny_run"])
    with tempfile.TemporaryDirectory(prefix="plan-scale-") as folder:
        root = Path(folder)
        write_inputs(root, documents=8)
        write_run(root, _recipe(root), arguments.units, arguments.documents)
        with ProcessPoolExecutor(1, forking, max_tasks_per_child=1) as pool:
            runs = [pool.submit(measure, name, folder, arguments.units).result() for name in MEASURED]
        sizes = {
            "documents_table": (root / "run/index/documents/part-000000.parquet").stat().st_size,
            "embed_manifest": (root / "run/embed/manifest.json").stat().st_size,
        }
    print(json.dumps({"units": arguments.units, "documents": arguments.documents, "bytes": sizes, "runs": runs}, indent=2))


def _recipe(root: Path) -> Recipe:
    """A recipe on the inputs there, whose index is the one that was written and not that of its corpus."""
    return tiny_recipe(root, "scale").model_copy(update={"output": str(root / "run")})


if __name__ == "__main__":
    main()
