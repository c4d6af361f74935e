"""What the step `sae` measures after training: the model's loss with reconstructions spliced in, and stability over seeds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finescope.config import CorpusSection, SaeSection
from finescope.models.load import ModelReference, load_model
from finescope.runners.base import Context, Progress, Resources
from finescope.sae.chunks import Chunk, ChunkReader
from finescope.sae.dictionary import load_dictionary
from finescope.sae.metrics import metric_rows
from finescope.sae.naming import MAIN
from finescope.sae.recovery import CrossEntropy, cross_entropy_recovered
from finescope.sae.stability import stability
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


def adopted(context: Context, documents: DocumentSet, path: str, uri: str) -> tuple[dict[str, Any], list[tuple[str, float, str]]]:
    raise AssertionError
