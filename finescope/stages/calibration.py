"""The documents that `prune` reads: those that it calibrates on, and general ones to compare with; and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from finescope.config import CorpusSection, PruneSection
from finescope.corpus.tokenise import length_batches, pad_batch, tokenise
from finescope.models.load import load_tokenizer
from finescope.pruning.stream import Batch
from finescope.runners.base import Context
from finescope.stages.references import model_of, random_documents, read_located, read_shards
from finescope.steps import StepInput

# Tokens of a forward and backward pass, padding included.
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Documents:
    """Documents of the corpus, tokenised."""

    ids: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]  # int32 [T] each

    @property
    def num_tokens(self) -> int:
        """Tokens of all of them."""
        return sum(map(len, self.tokens))


def calibration_documents(context: Context, corpus: CorpusSection, section: PruneSection, step: StepInput) -> Documents:
    """The best of the curated set, or random documents."""
    if section.calibration == "random":
        return _random(context, corpus, section, step, section.documents, ())
    return _tokenised(read_shards(step["curate"], "curated", ["doc_id", "text"], section.documents), section, step)


def general_documents(
    context: Context, corpus: CorpusSection, section: PruneSection, step: StepInput, without: Sequence[str]
) -> Documents:
    """Random documents that are not `without`; none where the importance would be the same on them."""
    if not (section.general_documents and section.reads_documents):
        return Documents((), ())
    return _random(context, corpus, section, step, section.general_documents, without)


def batches_of(tokens: Sequence[np.ndarray], pad_id: int) -> tuple[list[Batch], np.ndarray]:
    """Documents (int32 [T] each) in batches of like length, and which document each row is: int64 [D]."""
    chosen = length_batches([len(document) for document in tokens], BATCH_TOKENS)
    padded = [pad_batch([tokens[document] for document in documents], pad_id) for documents in chosen]
    batches = [(torch.from_numpy(ids), torch.from_numpy(mask)) for ids, mask in padded]
    return batches, np.concatenate(chosen)


def _random(
    context: Context, corpus: CorpusSection, section: PruneSection, step: StepInput, count: int, without: Sequence[str]
) -> Documents:
    located = random_documents(step, count, section.seed, without)
    texts = read_located(context, step["index"], model_of(step["model"]), corpus, located, "prune: reading").column("text")
    return _tokenised(pa.table({"doc_id": located["doc_id"].to_list(), "text": texts}), section, step)


def _tokenised(documents: pa.Table, section: PruneSection, step: StepInput) -> Documents:
    tokenizer = load_tokenizer(model_of(step["model"]))
    tokens = tokenise(tokenizer, documents.column("text").to_pylist(), section.max_tokens)
    return Documents(tuple(documents.column("doc_id").to_pylist()), tuple(tokens))
