"""Which latents go with a head: its activation in each document, correlated with the documents' codes."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from finescope.models.blocks import Blocks
from finescope.models.groups import layout_of
from finescope.pruning.general import Head
from finescope.pruning.stream import Batch, Portions, Progress, open_stream, output_inputs
from finescope.schemas import HEAD_LATENTS, conform


@torch.no_grad()
def head_activations(source: Blocks, heads: Sequence[Head], batches: Sequence[Batch], progress: Progress) -> np.ndarray:
    """How active each head is in each document: float32 [documents, heads], documents in the order of the batches.

    It is the root mean square, over a document's tokens and the group's dimensions, of the group's part of what the
    attention's output map is given. The first token is left out, as it is of the codes (an attention sink). One forward pass,
    block by block, that ends with the deepest head. `progress` is told of the batches' tokens, once in all.
    """
    anatomy, groups = source.anatomy, layout_of(source.model, source.anatomy).heads.groups
    stream, deepest = open_stream(source.model, anatomy, batches), max(head.layer for head in heads)
    portions = Portions(sum(int(mask.sum()) for _, mask in batches), deepest, progress)
    found: list[list[Tensor]] = [[] for _ in heads]
    for layer in range(deepest):
        wanted = [number for number, head in enumerate(heads) if head.layer == layer + 1]
        with source.block(layer) as block:
            for index, hidden, call in stream.at(layer):
                if wanted:
                    inputs, _, after = output_inputs(block, anatomy, hidden, call)
                    active = _root_mean_square(inputs, batches[index][1].to(stream.device), groups)
                    for head in wanted:
                        found[head].append(active[:, heads[head].group])
                else:
                    after = block(hidden, *call.positional, **call.named)
                stream.hidden[index] = after.cpu()
        portions.done(1)
    return torch.stack([torch.cat(parts) for parts in found], dim=1).float().cpu().numpy()


def latent_correlations(
    heads: Sequence[Head], activations: np.ndarray, codes: pa.Table, in_domain: np.ndarray, least: int
) -> pa.Table:
    """Pearson's correlation of each head's activation with each latent over D documents: a table of schemas.HEAD_LATENTS.

    Args:
        activations: float [D, heads].
        codes: columns `latent_ids` and `latent_values` of schemas.EMBEDDINGS, a row a document; a latent that is not among
            a document's is zero in it.
        in_domain: bool [D], which of them are the domain's.
        least: documents that must have a latent for it to count.

    Returns:
        A head's rows stand together, by falling correlation. What is the same in all documents correlates with nothing and
        has no row.
    """
    latents, values = _columns(codes, least)  # [L], [D, L]
    correlations = _standardised(activations.astype(np.float64)).T @ _standardised(values)  # [heads, L]
    about = {
        "documents": (values > 0).sum(axis=0),
        "domain_mean": _mean(values[in_domain]),
        "general_mean": _mean(values[~in_domain]),
    }
    tables = [HEAD_LATENTS.empty_table()]
    for head, found in zip(heads, correlations, strict=True):
        order = np.lexsort((latents, -found))
        order = order[np.isfinite(found[order])]
        rows = {"layer": np.full(len(order), head.layer), "group_index": np.full(len(order), head.group)}
        rows |= {"latent": latents[order], "correlation": found[order]}
        tables.append(conform(pa.table(rows | {name: column[order] for name, column in about.items()}), HEAD_LATENTS))
    return pa.concat_tables(tables)


def _root_mean_square(inputs: Tensor, mask: Tensor, groups: int) -> Tensor:
    """[documents, groups] of [documents, tokens, groups * width], over the tokens after the first."""
    squares = inputs[:, 1:].float().unflatten(-1, (groups, -1)).square().mean(dim=-1)  # [documents, tokens - 1, groups]
    counted = mask[:, 1:, None]
    return ((squares * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)).sqrt()


def _columns(codes: pa.Table, least: int) -> tuple[np.ndarray, np.ndarray]:
    """The latents that `least` documents have, int [L], ascending, and their values float64 [documents, L]."""
    ids, values = (codes.column(name).combine_chunks() for name in ("latent_ids", "latent_values"))
    rows = np.repeat(np.arange(len(codes)), np.asarray(ids.value_lengths(), dtype=np.int64))
    flat_ids, flat_values = np.asarray(ids.flatten()), np.asarray(values.flatten().cast(pa.float64()))
    active = flat_values > 0
    latents, column, counts = np.unique(flat_ids[active], return_inverse=True, return_counts=True)
    matrix = np.zeros((len(codes), len(latents)))
    matrix[rows[active], column] = flat_values[active]
    return latents[counts >= least], matrix[:, counts >= least]


def _standardised(columns: np.ndarray) -> np.ndarray:
    """Columns less their means, of length one; nan where a column is constant."""
    centred = columns - columns.mean(axis=0)
    return centred / np.where(np.ptp(columns, axis=0) > 0, np.linalg.norm(centred, axis=0), np.nan)


def _mean(rows: np.ndarray) -> np.ndarray:
    """The mean of rows, and zero of none."""
    return rows.sum(axis=0) / max(len(rows), 1)
