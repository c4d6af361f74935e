"""What the step `sae` measures after training: the model's loss with reconstructions spliced in, and stability over seeds."""

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from finescope.config import CorpusSection, SaeSection
from finescope.models.load import ModelReference, load_model
from finescope.runners.base import Context, Progress, Resources
from finescope.sae.adopt import adopt_dictionary
from finescope.sae.chunks import Chunk, ChunkReader
from finescope.sae.dictionary import load_dictionary, save_dictionary
from finescope.sae.extract import SiteColumns, extract
from finescope.sae.metrics import DictionaryMeter, metric_rows
from finescope.sae.naming import MAIN
from finescope.sae.recovery import CrossEntropy, cross_entropy_recovered
from finescope.sae.stability import stability
from finescope.sae.statistics import latents_table
from finescope.sae.stream import TokenBatch
from finescope.stages.references import memory_bytes


@dataclass(frozen=True)
class DocumentSet:
    """Documents and what it takes to read them as the training does. Goes to other processes."""

    model: ModelReference
    corpus: CorpusSection
    max_tokens: int
    chunks: tuple[Chunk, ...]

    def first(self, documents: int) -> "DocumentSet":
        """The first so many of them; where rows are rejected when they are read, somewhat fewer."""
        kept, left = [], documents
        for chunk in self.chunks:
            kept += [{**chunk, "count": min(left, chunk["count"])}] if left > 0 else []
            left -= chunk["count"]
        return replace(self, chunks=tuple(kept))

    def batches(self) -> Iterator[TokenBatch]:
        """Their tokens."""
        reader = ChunkReader(self.model, self.corpus, self.max_tokens)
        for chunk in self.chunks:
            yield from reader.batches(chunk)


def recovered(context: Context, documents: DocumentSet, most: int, uris: Mapping[str, str]) -> list[tuple[str, float]]:
    """Rows of `metrics`: the cross-entropy that each dictionary (name to URI) recovers on `most` of the documents."""
    if not most:
        return []
    chosen = documents.first(most)
    with context.reporter.task("sae: recovered loss", most, "documents") as progress:
        resources = Resources(memory_bytes(documents.model))
        found = context.runner.call(_recover, (chosen, list(uris.values())), progress, resources)
    return [row for name, entropy in zip(uris, found, strict=True) for row in metric_rows(name, None, entropy, None)]


def _recover(documents: DocumentSet, uris: list[str], progress: Progress) -> list[CrossEntropy]:
    dictionaries = [load_dictionary(uri) for uri in uris]
    return cross_entropy_recovered(load_model(documents.model), dictionaries, documents.batches(), progress)


def stabilities(section: SaeSection, uris: Mapping[str, str]) -> list[tuple[str, float]]:
    """Rows of `metrics`: of each variant that is another seed and nothing else, how alike it and the main dictionary are."""
    main, rows = None, []
    for variant in section.variants:
        if variant.model_dump(exclude_none=True).keys() == {"seed"}:
            main = main or load_dictionary(uris[MAIN]).autoencoder
            other = load_dictionary(uris[variant.name]).autoencoder
            rows += metric_rows(variant.name, None, None, stability(main, other))
    return rows


def adopted(
    context: Context, documents: DocumentSet, path: str, uri: str
) -> tuple[dict[str, Any], list[tuple[str, float, str]], pa.Table]:
    """Facts, rows of `metrics` and the table `latents` of the dictionary at `path`, which is saved at `uri`.

    Raises:
        DictionaryError: there is none, it does not fit the model, or it explains nothing of it.
    """
    with context.reporter.task("sae: measuring", 1, "dictionaries") as progress:
        found = context.runner.call(_adopt, (documents, path, uri), progress, Resources(memory_bytes(documents.model)))
    if found.warning is not None:
        context.reporter.warn(found.warning)
    return found.facts, [(name, value, found.ended) for name, value in found.rows], found.latents


class _Found(NamedTuple):
    facts: dict[str, Any]
    rows: list[tuple[str, float]]
    latents: pa.Table
    warning: str | None
    ended: str


def _adopt(documents: DocumentSet, path: str, uri: str, progress: Progress) -> _Found:
    found = adopt_dictionary(path, documents.model, documents.batches())
    save_dictionary(uri, found.dictionary)
    autoencoder = found.dictionary.autoencoder
    # Once more over the documents: only now are the moments known in which the figures are given.
    network = load_model(documents.model, num_layers=found.dictionary.layer)
    meter = DictionaryMeter(autoencoder.to(network.device))
    every = SiteColumns(found.dictionary.hook, autoencoder.d_in, np.arange(autoencoder.d_in), None)
    for activations in extract(network, documents.batches(), (every,)):
        meter.update(activations)
    progress(1)
    facts = {
        "path": path,
        "layer": found.dictionary.layer,
        "site": found.dictionary.hook.site,
        "architecture": autoencoder.architecture,
        "num_latents": autoencoder.num_latents,
        "k": autoencoder.k,
        "coordinates": autoencoder.coordinates.tolist(),
        "fvu": found.fvu,
        "fvu_recorded": found.recorded_fvu,
        "moments_estimated": found.moments_estimated,
        "held_out_tokens": found.tokens,
    }
    rows, latents = metric_rows(MAIN, meter, None, None), latents_table(MAIN, meter.statistics)
    return _Found(facts, rows, latents, found.warning, datetime.datetime.now(datetime.UTC).isoformat())
