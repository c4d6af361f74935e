"""The table `head_latents` of `prune`: heads that the domain asks more of than general text, and latents that go with them."""

import numpy as np
import pyarrow as pa

from finescope.curation.shards import ShardCodes
from finescope.models.blocks import open_blocks
from finescope.models.load import ModelReference, default_device, load_tokenizer
from finescope.pruning.general import Head, heads_of_domain
from finescope.pruning.head_latents import head_activations, latent_correlations
from finescope.runners.base import Context, Progress, Resources
from finescope.schemas import HEAD_LATENTS
from finescope.stages.calibration import Documents, batches_of
from finescope.stages.references import memory_bytes
from finescope.stages.scoring import units_of
from finescope.steps import StepInput

_HEADS = 8
# Documents that must have a latent: a correlation over fewer is of single documents.
_DOCUMENTS = 5


def head_latents(
    context: Context, model: ModelReference, importance: pa.Table, domain: Documents, general: Documents, step: StepInput
) -> pa.Table:
    """A table of schemas.HEAD_LATENTS; without rows where the domain asks more of no head.

    Args:
        importance: schemas.IMPORTANCE with `general`, on the documents `domain` and `general`.
    """
    heads = tuple(heads_of_domain(importance, _HEADS))
    if not heads:
        return HEAD_LATENTS.empty_table()
    with context.reporter.task("prune: heads", domain.num_tokens + general.num_tokens, "tokens") as progress:
        arguments = (model, heads, domain.tokens + general.tokens)
        activations = context.runner.call(activations_of, arguments, progress, Resources(memory_bytes(model, 1.2)))
    codes = stored_codes(context, domain.ids + general.ids, step)
    return latent_correlations(heads, activations, codes, np.arange(len(activations)) < len(domain.ids), _DOCUMENTS)


def activations_of(
    reference: ModelReference, heads: tuple[Head, ...], tokens: tuple[np.ndarray, ...], progress: Progress
) -> np.ndarray:
    """How active each head is in each of the documents (int32 [T] each), in their order: float32 [documents, heads]."""
    batches, rows = batches_of(tokens, load_tokenizer(reference).pad_token_id)
    with open_blocks(reference, default_device()) as source:
        return head_activations(source, heads, batches, progress)[np.argsort(rows)]


def stored_codes(context: Context, doc_ids: tuple[str, ...], step: StepInput) -> pa.Table:
    """The documents' codes: doc_id, latent_ids, latent_values, a row a document, in the order of `doc_ids`."""
    files = step["embed"].files("embeddings") + (step["screen"].files("sampled") if "screen" in step.inputs else [])
    found: list[pa.Table] = []
    with context.reporter.task("prune: codes", len(doc_ids), "documents") as progress:
        for table in context.runner.map(ShardCodes, (doc_ids,), units_of(files), Resources(accelerator=False)):
            found.append(table)
            progress(table.num_rows)
    codes = pa.concat_tables(found)
    # A document of the screen's sample that passed it is in both tables, with the same code.
    places = {doc_id: row for row, doc_id in enumerate(codes.column("doc_id").to_pylist())}
    return codes.take(pa.array([places[doc_id] for doc_id in doc_ids]))
