"""`embed` through Ray against the bare truncated forward pass, and two actors against one. Prints JSON.

    OMP_NUM_THREADS=1 python tests/benchmarks/embed_speed.py --corpus '../shared/data/corpus/*.parquet'

The limit is the first blocks of SmolLM2-135M alone on the same documents, tokenised beforehand, sorted by length over all of
them, in the batches of `--forward-tokens`. Against it: the worker of the step over units of the corpus in a Ray Data pool, from
files on storage to shards and records on storage, timed from the first unit that is done to the last. One thread each; medians
of alternating rounds; ratios of documents a second. What two actors can be to one is what two processes of the bare forward
pass are to one on the same cores, measured beside them (`forward_two`). `cpu`: the same by the CPU seconds of the process that
computes, all of its threads: what a machine that is shared with other work distorts less.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from activations import reference

from finescope.config import CorpusSection, EmbedSection
from finescope.corpus.documents import read_documents
from finescope.corpus.files import resolve
from finescope.corpus.tokenise import length_batches, pad_batch, tokenise
from finescope.corpus.units import inspect_file
from finescope.models.hooks import HookPoint, capture
from finescope.models.load import ModelReference, load_model, load_tokenizer
from finescope.runners.base import TableWorker
from finescope.runners.ray_data import map_units
from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.dictionary import save_dictionary
from finescope.sae.record import Dictionary
from finescope.stages.embed import UNITS_AT_ONCE, EmbedUnit

WIDTH = 576
Seconds = tuple[float, float]  # a document: of the clock, of the CPU


class Clocked:
    """The step's worker, with the CPU seconds of its process so far beside each record."""

    def __init__(self, worker: Callable[..., TableWorker], arguments: tuple[Any, ...]) -> None:
        self._worker = worker(*arguments)

    def __call__(self, batch: pa.Table) -> pa.Table:
        record = self._worker(batch)
        return record.append_column("cpu", pa.array([time.process_time()])).append_column("process", pa.array([os.getpid()]))


def write_dictionary(uri: str, layer: int, coordinates: int, latents: int) -> None:
    """A random topk dictionary: what it costs does not depend on its weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "encoder_weight": torch.randn(latents, coordinates, generator=generator) / coordinates**0.5,
        "encoder_bias": torch.zeros(latents),
        "decoder_weight": torch.randn(latents, coordinates, generator=generator),
        "decoder_bias": torch.zeros(coordinates),
        "coordinates": torch.randperm(WIDTH, generator=generator)[:coordinates].sort().values,
        "mean": torch.zeros(coordinates),
        "scale": torch.ones(coordinates),
    }
    autoencoder = SparseAutoencoder(weights, architecture="topk", k=32, d_in=WIDTH)
    save_dictionary(
        uri, Dictionary(autoencoder, HookPoint(layer), "random", "model", None, None, f"model.layers.{layer - 1}", 0.5)
    )


def units_of(corpus: CorpusSection, count: int, documents: int) -> list[dict[str, Any]]:
    """The first `count` units of the corpus, cut to their first documents."""
    units: list[dict[str, Any]] = []
    for number, file in enumerate(resolve(corpus)):
        for row in inspect_file(file, corpus).documents.to_pylist():
            place = {"unit": len(units), "take": min(documents, row["num_rows"]), "name": f"{number}", "file_index": number}
            units.append({**row, **place})
        if len(units) >= count:
            break
    return units[:count]


def forward_alone(
    model: ModelReference, corpus: CorpusSection, units: list[dict[str, Any]], layer: int, max_tokens: int, batch_tokens: int
) -> Callable[[], Seconds]:
    """Seconds a document of the bare forward pass over the documents of all units but the first."""
    network, tokenizer = load_model(model, num_layers=layer), load_tokenizer(model)
    texts: list[str] = []
    for unit in units[1:]:
        texts += read_documents(unit, corpus, unit["name"], None, unit["take"], "embed").table.column("text").to_pylist()
    tokens = tokenise(tokenizer, texts, max_tokens)
    batches = [
        tuple(map(torch.from_numpy, pad_batch([tokens[index] for index in batch], tokenizer.pad_token_id)))
        for batch in length_batches([len(item) for item in tokens], batch_tokens)
    ]

    def run() -> Seconds:
        began, cpu = time.perf_counter(), time.process_time()
        for ids, mask in batches:
            capture(network, ids, mask, [HookPoint(layer)])
        return (time.perf_counter() - began) / len(texts), (time.process_time() - cpu) / len(texts)

    return run


def forward_by_two(pool: Any, alone: tuple[Any, ...]) -> Seconds:
    """Seconds a document when two processes do all of the bare forward pass each, at the same time."""
    began = time.perf_counter()
    found = pool.map(_forward_again, [alone, alone], chunksize=1)
    # Wall clock of both together; each of them did all documents.
    return (time.perf_counter() - began) / sum(count for _, count in found), sum(cpu for cpu, _ in found) / 2


_forward: dict[str, Callable[[], Seconds]] = {}


def _forward_again(alone: tuple[Any, ...]) -> tuple[float, int]:
    """CPU seconds a document, and the documents. What a process made the first time it keeps."""
    torch.set_num_threads(1)
    if "forward" not in _forward:
        _forward["forward"] = forward_alone(*alone)
    _, cpu = _forward["forward"]()
    return cpu, sum(unit["take"] for unit in alone[2][1:])


def through_ray(arguments: tuple[Any, ...], units: list[dict[str, Any]], actors: int) -> Seconds:
    """Seconds a document from the first unit that is done, or with several actors the first of each, to the last."""
    folder = Path(arguments[-1])
    began = ended = 0.0
    documents = 0
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    work = pa.Table.from_pylist(units)
    options = {"num_cpus": 1.0}
    for record in map_units(Clocked, (EmbedUnit, arguments), work, (actors, actors), options, units_at_once=UNITS_AT_ONCE):
        row = record.to_pylist()[0]
        ended = time.perf_counter()
        if len(first) == actors:
            documents += row["rows_in"]
        first.setdefault(row["process"], row["cpu"])
        last[row["process"]] = row["cpu"]
        if len(first) == actors and not began:
            began = ended
    shutil.rmtree(folder)
    return (ended - began) / documents, sum(last[process] - first[process] for process in first) / documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--units", type=int, default=7)
    parser.add_argument("--documents", type=int, default=128, help="of a unit")
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--coordinates", type=int, default=128)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--forward-tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    import ray

    torch.set_num_threads(1)
    corpus = CorpusSection.model_validate({"path": arguments.corpus, "id": "id", "text": "{instruction}\n{input}\n{output}"})
    units = units_of(corpus, arguments.units, arguments.documents)
    section = EmbedSection(max_tokens=arguments.max_tokens)
    with tempfile.TemporaryDirectory(prefix="fs", dir="/tmp", ignore_cleanup_errors=True) as folder:
        model, dictionary, uri = reference(folder), f"{folder}/dictionary", f"{folder}/embed"
        write_dictionary(dictionary, arguments.layer, arguments.coordinates, arguments.latents)
        work = (model, dictionary, corpus, section, uri)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder + "/r")
        rounds: dict[str, Callable[[], Seconds]] = {}
        for size in arguments.forward_tokens:
            rounds[f"forward_{size}"] = forward_alone(model, corpus, units, arguments.layer, arguments.max_tokens, size)
        context = multiprocessing.get_context("spawn")
        pool = context.Pool(2)
        alone = (model, corpus, units, arguments.layer, arguments.max_tokens, min(arguments.forward_tokens))
        forward_by_two(pool, alone)  # loads the model in both
        rounds["forward_two"] = lambda: forward_by_two(pool, alone)
        for actors in arguments.actors:
            rounds[f"actors_{actors}"] = lambda actors=actors: through_ray(work, units, actors)
        seconds: dict[str, list[Seconds]] = {name: [] for name in rounds}
        for _ in range(arguments.rounds):
            for name, run in rounds.items():
                seconds[name].append(run())
        ray.shutdown()
        pool.terminate()
    found: dict[str, Any] = {"cpus": os.cpu_count(), "documents": sum(unit["take"] for unit in units)}
    for number, clock in enumerate(("wall", "cpu")):
        speed = {name: 1 / statistics.median(times[number] for times in rows) for name, rows in seconds.items()}
        best = max(value for name, value in speed.items() if name.startswith("forward") and name != "forward_two")
        ratios = {name: value / best for name, value in speed.items()}
        found[clock] = {"documents_per_second": speed, "to_forward": ratios}
    if len(arguments.actors) > 1:
        speed = found["wall"]["documents_per_second"]
        found["two_forwards_to_one"] = speed["forward_two"] / speed[f"forward_{min(arguments.forward_tokens)}"]
        found["two_actors_to_one"] = speed[f"actors_{arguments.actors[1]}"] / speed[f"actors_{arguments.actors[0]}"]
    print(json.dumps({**found, "seconds_per_document": seconds}, indent=2))


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    main()
