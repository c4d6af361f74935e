"""The inputs of the step `curate` without the steps before it: a corpus, its index, codes and scores, written directly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cli_runs import SilentReporter

from finescope import schemas, steps, storage
from finescope.config import CorpusSection, CurateSection
from finescope.manifest import Manifest, TableFile
from finescope.runners.base import Context
from finescope.runners.local import LocalRunner
from finescope.steps import Outcome, Step, StepInput

CORPUS = CorpusSection.model_validate({"path": ["corpus"], "id": "id"})
NUM_LATENTS = 64
SEEDS = ("one", "two", "three")
REFERENCE = {
    "path": "/models/tiny",
    "revision": None,
    "dtype": "float32",
    "trust_remote_code": False,
    "allow_pickle": False,
    "fingerprint": "f" * 64,
    "model_type": "llama",
    "num_layers": 3,
    "d_model": 32,
    "vocab_size": 64,
    "num_parameters": 1000,
    "block_parameters": 800,
}


def write_files(root: Path, tables: Sequence[pa.Table], row_group_size: int) -> list[dict[str, Any]]:
    """The corpus's files, one a table; rows of `documents`."""
    (root / "corpus").mkdir(parents=True)
    units = []
    for number, table in enumerate(tables):
        path = root / "corpus" / f"part-{number:03d}.parquet"
        pq.write_table(table, path, row_group_size=row_group_size)
        info = storage.info(str(path))
        for group, start in enumerate(range(0, table.num_rows, row_group_size)):
            rows = min(row_group_size, table.num_rows - start)
            units.append({"file": str(path), "row_group": group, "num_rows": rows, "bytes": 0, "etag": info.etag})
    return units


def codes(count: int, random: np.random.Generator) -> tuple[pa.Array, pa.Array]:
    """`latent_ids` and `latent_values` of random codes of four latents."""
    ids = np.sort(np.argpartition(random.random((count, NUM_LATENTS)), 4, axis=1)[:, :4], axis=1)
    values = random.uniform(0.1, 1, (count, 4)).astype(np.float16)
    offsets = pa.array(np.arange(0, 4 * count + 1, 4, dtype=np.int32))
    return (
        pa.ListArray.from_arrays(offsets, pa.array(ids.ravel().astype(np.int32))),
        pa.ListArray.from_arrays(offsets, pa.array(values.ravel())),
    )


def write_inputs(
    root: Path, tables: Sequence[pa.Table], scores: Sequence[float], row_group_size: int = 4, seed_of: Sequence[int] | None = None
) -> dict[str, Step]:
    """Steps `index` to `score`, done, of a corpus with the columns id and text; scores in the order of its rows."""
    units = write_files(root, tables, row_group_size)
    random, output = np.random.default_rng(0), str(root / "run")
    seeds = np.arange(len(scores)) % len(SEEDS) if seed_of is None else np.asarray(seed_of)
    starts = np.cumsum([0, *(unit["num_rows"] for unit in units)])
    ids = pa.concat_arrays([c for table in tables for c in table.column("id").chunks])
    files = list(dict.fromkeys(unit["file"] for unit in units))

    def index(step: StepInput) -> Outcome:
        table = pa.Table.from_pylist(units, schema=schemas.DOCUMENTS)
        return Outcome(tables={"documents": _put(step, "documents", [table])}, facts={"names": {f: f for f in files}})

    def located(number: int, more: dict[str, Any], schema: pa.Schema) -> pa.Table:
        unit, rows = units[number], units[number]["num_rows"]
        place = {
            "doc_id": ids.slice(starts[number], rows),
            "file": np.full(rows, files.index(unit["file"])),
            "row_group": np.full(rows, unit["row_group"]),
            "row": np.arange(rows),
            "num_tokens": np.full(rows, 10),
        }
        return schemas.conform(pa.table({**place, **more}), schema)

    def embed(step: StepInput) -> Outcome:
        shards = []
        for number, unit in enumerate(units):
            latents, values = codes(unit["num_rows"], random)
            more = {"fvu": np.zeros(unit["num_rows"]), "latent_ids": latents, "latent_values": values}
            shards.append(located(number, more, schemas.EMBEDDINGS))
        return Outcome(tables={"embeddings": _put(step, "embeddings", shards)})

    def score(step: StepInput) -> Outcome:
        shards = []
        for number, unit in enumerate(units):
            span = slice(starts[number], starts[number + 1])
            nothing = pa.array([[]] * unit["num_rows"], pa.list_(pa.int32()))
            more = {"score": np.asarray(scores)[span], "seed": seeds[span], "top_latents": nothing}
            shards.append(located(number, more, schemas.SCORES))
        return Outcome(tables={"scores": _put(step, "scores", shards)}, facts={"seeds": list(SEEDS)})

    functions = {
        "index": index,
        "model": lambda step: Outcome(facts={"reference": REFERENCE, "source": "/models/tiny"}),
        "sae": lambda step: Outcome(facts={"layer": 2, "architecture": "topk", "num_latents": NUM_LATENTS, "k": 4, "fvu": 0.1}),
        "embed": embed,
        "score": score,
    }
    done: dict[str, Step] = {}
    for name, function in functions.items():
        done[name] = Step(name, {"weighting": "centred"} if name == "score" else {}, tuple(done.values()))
        steps.run(done[name], output, function)
    return done


def run_curate(root: Path, before: dict[str, Step], **values: Any) -> Manifest:
    """The step `curate` with a section of `values`."""
    from finescope.stages.curate import curate

    section = CurateSection.model_validate(values)
    step = Step("curate", section.model_dump(mode="json"), tuple(before.values()))
    context = Context(LocalRunner(), SilentReporter())
    return steps.run(step, str(root / "run"), lambda inputs: curate(context, CORPUS, section, inputs))


def _put(step: StepInput, name: str, tables: Sequence[pa.Table]) -> tuple[TableFile, ...]:
    files = []
    for number, table in enumerate(tables):
        path = f"{name}/part-{number:06d}.parquet"
        files.append(TableFile(path=path, rows=table.num_rows, bytes=storage.put_parquet(storage.join(step.uri, path), table)))
    return tuple(files)
