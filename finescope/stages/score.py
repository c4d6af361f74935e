"""`score`: every document's likeness to the seeds, from the stored codes alone, in two passes over them."""

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pyarrow as pa

from finescope import schemas, storage
from finescope.config import CorpusSection, EmbedSection, ScoreSection, SeedsSection
from finescope.corpus.documents import read_seeds
from finescope.curation.codes import Codes, CorpusStatistics, codes_of
from finescope.curation.embed import embed_texts
from finescope.curation.score import Scorer
from finescope.errors import CorpusError
from finescope.manifest import TableFile
from finescope.models.load import ModelReference, load_tokenizer
from finescope.runners.base import Context, Progress, Resources
from finescope.stages.references import memory_bytes, model_of
from finescope.steps import Outcome, StepInput


class _Statistics:
    """Sums over one shard of `embeddings`; the table worker of the first pass."""

    def __init__(self, num_latents: int) -> None:
        self._num_latents = num_latents

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.to_pylist()[0]
        found = CorpusStatistics.of(codes_of(storage.read_parquet(row["file"]), self._num_latents))
        sums = {"sqrt_sum": found.sqrt_sum.tolist(), "share_sum": found.share_sum.tolist(), "active": found.active.tolist()}
        return pa.Table.from_pylist([{"unit": row["unit"], "documents": found.documents, **sums}])


class _Score:
    """Scores one shard of `embeddings`; the table worker of the second pass."""

    def __init__(self, scorer: Scorer, num_latents: int, uri: str) -> None:
        self._scorer, self._num_latents, self._uri = scorer, num_latents, uri

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.to_pylist()[0]
        embeddings = storage.read_parquet(row["file"])
        scored = self._scorer(codes_of(embeddings, self._num_latents))
        table = embeddings.select(["doc_id", "file", "row_group", "row", "num_tokens"])
        table = table.append_column("score", pa.array(scored.score)).append_column("seed", pa.array(scored.seed))
        table = schemas.conform(table.append_column("top_latents", scored.top_latents), schemas.SCORES)
        path = f"scores/part-{row['unit']:06d}.parquet"
        size = storage.put_parquet(storage.join(self._uri, path), table)
        return pa.Table.from_pylist([{"unit": row["unit"], "path": path, "rows": table.num_rows, "bytes": size}])


def score(
    context: Context, corpus: CorpusSection, seeds: SeedsSection, section: ScoreSection, embedded: EmbedSection, step: StepInput
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
    codes = _checked(codes_of(table, num_latents), seeds.path)
    files = embeddings.files("embeddings")
    units = pa.table({"unit": pa.array(range(len(files)), pa.int64()), "file": pa.array(files, pa.string())})
    statistics = _corpus_statistics(context, units, num_latents, embeddings.tables["embeddings"].rows)
    scorer = Scorer(codes, statistics, section.similarity, section.weighting)
    written: list[dict[str, Any]] = []
    with context.reporter.task("score", embeddings.tables["embeddings"].rows, "documents") as progress:
        for record in context.runner.map(_Score, (scorer, num_latents, step.uri), units, Resources(accelerator=False)):
            written.extend(record.to_pylist())
            progress(written[-1]["rows"])
    written.sort(key=lambda row: row["unit"])
    shards = tuple(TableFile(path=row["path"], rows=row["rows"], bytes=row["bytes"]) for row in written)
    rows = sum(shard.rows for shard in shards)
    facts = {"seeds": texts, "seed_latents": [codes.row(index)[0][:8].tolist() for index in range(len(codes))]}
    return Outcome(embeddings.tables["embeddings"].rows, rows, 0, {"scores": shards}, facts)


def _embed_seeds(texts: list[str], model: ModelReference, dictionary: str, section: EmbedSection, progress: Progress) -> pa.Table:
    table = embed_texts(texts, model, dictionary, section)
    progress(len(texts))
    return table


def _checked(codes: Codes, path: str) -> Codes:
    empty = np.flatnonzero(np.diff(codes.offsets) == 0)
    if len(empty):
        raise CorpusError(f"seeds.path: {path}: seed {int(empty[0]) + 1} has fewer than two tokens, or no latent is active on it")
    return codes


def _corpus_statistics(context: Context, units: pa.Table, num_latents: int, documents: int) -> CorpusStatistics:
    parts: list[dict[str, Any]] = []
    with context.reporter.task("score: corpus statistics", documents, "documents") as progress:
        for record in context.runner.map(_Statistics, (num_latents,), units, Resources(accelerator=False)):
            parts.extend(record.to_pylist())
            progress(parts[-1]["documents"])
    # In the order of the shards, whatever order they came in: a sum of floats depends on it.
    parts.sort(key=lambda row: row["unit"])
    return reduce(
        add,
        (
            CorpusStatistics(part["documents"], np.array(part["sqrt_sum"]), np.array(part["share_sum"]), np.array(part["active"]))
            for part in parts
        ),
    )
