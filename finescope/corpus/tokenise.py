"""Texts into tokens, and tokens into batches that waste little on padding."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a forward pass on a CPU: more leave its caches, 4,096 at a time take a third longer.
CPU_BATCH_TOKENS = 1024


def tokenise(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_tokens: int) -> list[np.ndarray]:
    """Token ids of each text, int32 [T], T <= max_tokens, cut at the end; special tokens as the model expects them.

    A text that brings its own beginning-of-sequence token (from a chat template) does not get a second one.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens, return_attention_mask=False)["input_ids"]
    begin = tokenizer.bos_token_id
    tokens = [np.asarray(ids, dtype=np.int32) for ids in encoded]  # pyright: ignore[reportGeneralTypeIssues]
    return [ids[1:] if begin is not None and len(ids) > 1 and ids[0] == ids[1] == begin else ids for ids in tokens]


def length_batches(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Batches of documents of like length: arrays of indices int64 into `lengths`, longest first, ties by index.

    Each batch's rows times its longest length is at most `batch_tokens`, save for a longer document on its own.
    """
    sizes = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    order = np.argsort(-sizes, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // int(sizes[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def pad_batch(token_lists: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), both int64 [B, T], padded on the right to the longest list; mask is 1 on tokens, 0 on padding."""
    lengths = np.array([len(tokens) for tokens in token_lists], dtype=np.int64)
    mask = (np.arange(lengths.max(initial=0)) < lengths[:, None]).astype(np.int64)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    if len(token_lists):
        ids[mask == 1] = np.concatenate(token_lists)
    return ids, mask
