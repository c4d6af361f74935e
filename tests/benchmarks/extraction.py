"""Extraction against the bare truncated forward pass, and extraction with training. Prints JSON.

    python tests/benchmarks/extraction.py --corpus '../shared/data/corpus/*.parquet'

The limit is the first 10 blocks of SmolLM2-135M alone, on the same chunks, tokenised, sorted by length and padded before the
clock starts. Against it: the same chunks through Ray Data on one actor, from documents on storage to activations in the
driver, by the actor's clock from the end of the first chunk to that of the last, whatever it does or waits for meanwhile (chunks
reach the driver in bursts, whose size would be in a figure taken there); and extraction and training of 4,096 latents, taking
turns in one process. One thread each; medians of alternating rounds; ratios of tokens a second.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from activations import reference

from finescope.config import CorpusSection, SaeSection
from finescope.corpus.files import resolve
from finescope.corpus.units import inspect_file
from finescope.models.hooks import HookPoint, capture
from finescope.models.load import ModelReference, load_model
from finescope.runners.base import Resources, Source
from finescope.runners.ray_data import UnitStream
from finescope.sae.chunks import Chunk, ChunkReader, plan_chunks
from finescope.sae.extract import Extractor, SiteColumns, activations_of
from finescope.sae.fit import FitPlan, fit
from finescope.sae.stream import used_positions

LAYER, WIDTH = 10, 576


def chunks_of(corpus: CorpusSection, count: int, documents: int) -> list[Chunk]:
    """The first chunks of the plan over all of the corpus, cut to their first documents."""
    units: list[dict[str, Any]] = []
    for number, file in enumerate(resolve(corpus)):
        for row in inspect_file(file, corpus).documents.to_pylist():
            place = {"unit": len(units), "take": row["num_rows"], "name": f"{number}", "file_index": number}
            units.append({**row, **place})
    return [{**chunk, "count": documents} for chunk in plan_chunks(units, seed=0)[:count]]


def forward_alone(model: ModelReference, corpus: CorpusSection, chunks: list[Chunk], max_tokens: int) -> Callable[[], float]:
    """Seconds a used token of the bare forward pass; the first chunk warms up."""
    network = load_model(model, num_layers=LAYER)
    reader = ChunkReader(model, corpus, max_tokens)
    batches = [[(torch.from_numpy(i), torch.from_numpy(m)) for i, m in reader.batches(chunk)] for chunk in chunks]

    def run() -> float:
        tokens, began = 0, 0.0
        for number, chunk in enumerate(batches):
            for ids, mask in chunk:
                capture(network, ids, mask, [HookPoint(LAYER)])
                tokens += int(used_positions(mask).sum()) if number else 0
            began = began or time.perf_counter()
        return (time.perf_counter() - began) / tokens

    return run


class StampedExtractor(Extractor):
    """An extractor that says when it was done with each chunk."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        table = super().__call__(batch)
        return table.append_column("done", pa.array(np.full(table.num_rows, time.monotonic())))


def through_ray(stream: UnitStream, count: int) -> float:
    """Seconds a token, from the end of the first chunk to that of the last."""
    ends = sorted((table.column("done")[0].as_py(), table.num_rows) for table in stream(0, count, 1))
    return (ends[-1][0] - ends[0][0]) / sum(rows for _, rows in ends[1:])


def with_training(source: Source, section: SaeSection) -> Callable[[], float]:
    """Seconds a token of extraction and training in one process.

    The model is loaded, and the first chunk, which is held out and not trained on, extracted before the clock starts.
    """
    worker = source.worker(*source.arguments)
    first = activations_of(worker(source.units.slice(0, 1)))
    count = source.units.num_rows

    def stream(start: int, stop: int, step: int) -> Iterator[np.ndarray]:
        for number in range(start, stop, step):
            yield activations_of(worker(source.units.slice(number, 1))) if number else first

    def run() -> float:
        began = time.perf_counter()
        plan = FitPlan((section,), ((0, WIDTH),), count, 1, None)
        (result,) = fit(plan, stream, torch.device("cpu"), lambda _: None)
        return (time.perf_counter() - began) / result.trained_tokens

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--documents", type=int, default=64, help="of a chunk")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    import ray

    torch.set_num_threads(1)
    corpus = CorpusSection.model_validate({"path": arguments.corpus, "id": "id", "text": "{instruction}\n{input}\n{output}"})
    chunks = chunks_of(corpus, arguments.chunks, arguments.documents)
    with tempfile.TemporaryDirectory(prefix="fs", dir="/tmp") as folder:
        model = reference(folder)
        sites = (SiteColumns(HookPoint(LAYER), WIDTH, np.arange(WIDTH), None),)
        settings = (model, corpus, arguments.max_tokens, sites, None)
        source = Source(StampedExtractor, settings, pa.Table.from_pylist(chunks), Resources(), 2**28)
        section = SaeSection.model_validate({"num_tokens": 10**9, "coordinates": {"method": "all"}, "dead_after_tokens": 20_000})
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder + "/r")
        rounds: dict[str, Callable[[], float]] = {
            "forward": forward_alone(model, corpus, chunks, arguments.max_tokens),
            "ray_actor": lambda: through_ray(UnitStream(source, (1, 1), {"num_cpus": 1.0}), len(chunks)),
            "extract_and_train": with_training(source, section),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rounds}
        for _ in range(arguments.rounds):
            for name, run in rounds.items():
                seconds[name].append(run())
        ray.shutdown()
    speed = {name: 1 / statistics.median(times) for name, times in seconds.items()}
    ratios = {f"{name}_to_forward": speed[name] / speed["forward"] for name in speed if name != "forward"}
    print(json.dumps({"cpus": os.cpu_count(), "tokens_per_second": speed, **ratios, "seconds_per_token": seconds}, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    main()
