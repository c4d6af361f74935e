"""The stream of activations that an autoencoder is trained on, cut into shuffle buffers and a tail that is held out."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from finescope.models.hooks import HookPoint, capture

# input_ids [B, T] int64 and attention_mask [B, T], padded on either side.
TokenBatch = tuple[np.ndarray, np.ndarray]


class Fill(NamedTuple):
    """A filled shuffle buffer. Both tensors are views that the next fill overwrites."""

    activations: Tensor  # [n, C] to train on
    held_out: Tensor  # [m, C], never trained on; empty but for the last fill
    last: bool


def used_positions(attention_mask: Tensor) -> Tensor:
    """[B, T] bool: tokens, but for each document's first, which is an attention sink of outlying norm (METHOD 1)."""
    mask = attention_mask.bool()
    return mask & (mask.cumsum(1) > 1)


def stream_activations(model: PreTrainedModel, batches: Iterable[TokenBatch], layer: int) -> Iterator[Tensor]:
    """Activations [N, d_model] float32 of each batch's used positions, on the model's device."""
    for input_ids, attention_mask in batches:
        ids = torch.from_numpy(input_ids).to(model.device)
        mask = torch.from_numpy(attention_mask).to(model.device)
        yield capture(model, ids, mask, [HookPoint(layer)])[0][used_positions(mask)].float()


def first_documents(batches: Iterator[TokenBatch], count: int) -> list[TokenBatch]:
    """The batches that hold the first `count` documents, taken off the iterator whole."""
    taken: list[TokenBatch] = []
    while sum(len(ids) for ids, _ in taken) < count:
        batch = next(batches, None)
        if batch is None:
            break
        taken.append(batch)
    return taken


def fill_buffers(chunks: Iterator[Tensor], *, num_tokens: int, held_out: int, buffer_tokens: int) -> Iterator[Fill]:
    """Cut a stream of chunks [n, C] into fills of `buffer_tokens`, the last one smaller, and hold out what comes last.

    At most `num_tokens + held_out` activations are read. From a stream that ends earlier the same share is held out.
    Memory is that of `buffer_tokens + held_out` activations, allocated once.
    """
    store: Tensor | None = None
    buffer = min(buffer_tokens, num_tokens)
    wanted = num_tokens + held_out
    filled = read = 0
    for chunk in chunks:
        rest = chunk[: wanted - read]
        read += len(rest)
        if store is None:
            store = rest.new_empty(buffer + held_out, chunk.shape[1])
        while len(rest):
            if filled == len(store):
                yield Fill(store[:buffer], store[:0], last=False)
                store[:held_out] = store[buffer:].clone()
                filled = held_out
            part = rest[: len(store) - filled]
            store[filled : filled + len(part)] = part
            filled += len(part)
            rest = rest[len(part) :]
        if read == wanted:
            break
    if store is None:
        return
    tail = min(held_out, max(2, read * held_out // wanted), filled)
    yield Fill(store[: filled - tail], store[filled - tail : filled], last=True)
