"""`score`: every document's likeness to the seeds, from the stored codes alone, in two passes over them."""

from typing import Any

import numpy as np
import pyarrow as pa

from finescope import storage
from finescope.config import CorpusSection, EmbedSection, ScoreSection
from finescope.config_seeds import SeedFile
from finescope.corpus.documents import read_seeds
from finescope.curation.codes import Codes, CorpusStatistics, codes_of
from finescope.curation.embed import embed_texts
from finescope.curation.score import Scorer
from finescope.curation.shards import ShardScorer, ShardStatistics
from finescope.errors import CorpusError
from finescope.manifest import TableFile
from finescope.models.load import ModelReference, load_tokenizer
from finescope.runners.base import Context, Progress, Resources
from finescope.stages.references import memory_bytes, model_of
from finescope.steps import Outcome, StepInput


def score(
    context: Context, corpus: CorpusSection, seeds: SeedFile, section: ScoreSection, embedded: EmbedSection, step: StepInput
) -> Outcome:
    """Score all embedded documents.

    Raises:
        CorpusError: a seed is empty, or has no active latent.
    """
    model = model_of(step["model"])
    dictionary = storage.join(step["sae"].uri, "dictionary")
    num_latents = int(step["sae"].facts["num_latents"])
    embeddings = step["embed"]
    texts = read_seeds(seeds, corpus, load_tokenizer(model))
    with context.reporter.task("score: seeds", len(texts), "seeds") as progress:
        arguments = (texts, model, dictionary, embedded)
        table = context.runner.call(_embed_seeds, arguments, progress, Resources(memory_bytes(model)))
    codes = _checked(codes_of(table, num_latents), seeds)
    files = embeddings.files("embeddings")
    units = pa.table({"unit": pa.array(range(len(files)), pa.int64()), "file": pa.array(files, pa.string())})
    documents = embeddings.tables["embeddings"].rows
    with_background = section.weighting == "contrast"
    statistics, background = _of_corpus(context, units, num_latents, documents, with_background)
    scorer = Scorer(codes, statistics, section.similarity, section.weighting, section.temperature, background)
    written: list[dict[str, Any]] = []
    with context.reporter.task("score", documents, "documents") as progress:
        for record in context.runner.map(ShardScorer, (scorer, num_latents, step.uri), units, Resources(accelerator=False)):
            written.extend(record.to_pylist())
            progress(written[-1]["rows"])
    written.sort(key=lambda row: row["unit"])
    shards = tuple(TableFile(path=row["path"], rows=row["rows"], bytes=row["bytes"]) for row in written)
    rows = sum(shard.rows for shard in shards)
    facts: dict[str, Any] = {"seeds": texts, "seed_latents": [codes.row(index)[0][:8].tolist() for index in range(len(codes))]}
    if with_background:
        facts["background"] = len(background)
    return Outcome(documents, rows, 0, {"scores": shards}, facts)


def _embed_seeds(texts: list[str], model: ModelReference, dictionary: str, section: EmbedSection, progress: Progress) -> pa.Table:
    table = embed_texts(texts, model, dictionary, section)
    progress(len(texts))
    return table


def _checked(codes: Codes, seeds: SeedFile) -> Codes:
    empty = np.flatnonzero(np.diff(codes.offsets) == 0)
    if len(empty):
        number = int(empty[0]) + 1
        raise CorpusError(f"{seeds.key}: {seeds.path}: seed {number} has fewer than two tokens, or no latent is active on it")
    return codes


def _of_corpus(
    context: Context, units: pa.Table, num_latents: int, documents: int, with_background: bool
) -> tuple[CorpusStatistics, Codes]:
    """The sums over all shards, and the codes of the background, none where it is not asked for."""
    samples: list[tuple[int, Codes]] = []
    total: CorpusStatistics | None = None
    # Added up in the order of the shards, whatever order they come in: a sum of floats depends on it.
    waiting: dict[int, CorpusStatistics] = {}
    added = 0
    arguments = (num_latents, documents, with_background)
    with context.reporter.task("score: corpus statistics", documents, "documents") as progress:
        for record in context.runner.map(ShardStatistics, arguments, units, Resources(accelerator=False)):
            (row,) = record.drop_columns(["latent_ids", "latent_values"]).to_pylist()
            sample = pa.table({name: record.column(name).combine_chunks().flatten() for name in ("latent_ids", "latent_values")})
            samples.append((row["unit"], codes_of(sample, num_latents)))
            waiting[row["unit"]] = CorpusStatistics.from_row(row)
            while (part := waiting.pop(added, None)) is not None:
                total, added = part if total is None else total + part, added + 1
            progress(row["documents"])
    samples.sort(key=lambda part: part[0])
    assert total is not None
    return total, Codes.concatenated([sample for _, sample in samples])
