"""Perplexity of a causal language model: exp of the mean negative log-likelihood of the tokens that are predicted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from finescope.corpus.tokenise import length_batches, pad_batch
from finescope.models.likelihood import check_logits, token_nll
from finescope.runners.base import Progress


@dataclass(frozen=True)
class Perplexity:
    """The measure of a set of documents."""

    value: float  # exp(sum of nll / number of tokens): token-weighted; nan where nothing is predicted
    num_tokens: int  # predicted tokens: all but the first of each document
    nll: np.ndarray  # float64 [D]: negative log-likelihood of each document, in nats
    tokens: np.ndarray  # int64 [D]: predicted tokens of each document


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Sequence[tuple[np.ndarray, np.ndarray]], progress: Progress) -> Perplexity:
    """Perplexity over right-padded batches of (ids, mask), int64 [B, T] each; documents in the order of the batches.

    The first token of a document has no prediction and padding none either. `progress` is told of documents done.

    Raises:
        ModelError: the family changes its logits in a way that is not known.
    """
    check_logits(model)
    was_training = model.training
    model.eval()
    nll: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    for ids, mask in batches:
        batch_nll, batch_tokens = _document_nll(model, ids, mask)
        nll.append(batch_nll)
        tokens.append(batch_tokens)
        progress(len(ids))
    model.train(was_training)
    all_nll = np.concatenate(nll) if nll else np.zeros(0)
    all_tokens = np.concatenate(tokens) if tokens else np.zeros(0, dtype=np.int64)
    return _perplexity(all_nll, all_tokens)


def perplexity_of_documents(
    model: PreTrainedModel, documents: Sequence[np.ndarray], batch_tokens: int, pad_id: int, progress: Progress
) -> Perplexity:
    """Perplexity of tokenised documents (int [T] each), batched by length; `nll` and `tokens` in their order."""
    batches = length_batches([len(document) for document in documents], batch_tokens)
    padded = [pad_batch([documents[i] for i in batch.tolist()], pad_id) for batch in batches]
    measured = perplexity(model, padded, progress)
    order = np.argsort(np.concatenate(batches)) if batches else np.zeros(0, dtype=np.int64)
    return _perplexity(measured.nll[order], measured.tokens[order])


def _perplexity(nll: np.ndarray, tokens: np.ndarray) -> Perplexity:
    num_tokens = int(tokens.sum())
    # math.fsum is exact, so that the value does not depend on how the documents were batched.
    mean = math.fsum(nll.tolist()) / num_tokens if num_tokens else math.nan
    # exp overflows a double above 709 nats a token; a ruined model is infinitely perplexed, not an error.
    return Perplexity(math.exp(mean) if not mean > 709.0 else math.inf, num_tokens, nll, tokens)


def _document_nll(model: PreTrainedModel, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nll float64 [B], predicted tokens int64 [B]) of one batch."""
    assert bool((np.diff(mask, axis=1) <= 0).all()), "padding is on the right"
    predicted = torch.from_numpy(mask[:, 1:] == 1)  # [B, T - 1]
    counts = predicted.sum(dim=1).numpy()
    if not counts.any():
        return np.zeros(len(ids)), counts
    device = model.device
    tokens = torch.from_numpy(ids).to(device)
    # No attention mask: with causal attention and padding on the right no token sees any.
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # [B, T, d]
    hidden = hidden[:, :-1][predicted.to(device)]  # [N, d], N predicted tokens, document after document
    targets = tokens[:, 1:][predicted.to(device)]  # [N]
    target_nll = token_nll(model, hidden, targets).double().cpu().numpy()  # [N]
    document = np.repeat(np.arange(len(ids)), counts)  # [N]
    return np.bincount(document, weights=target_nll, minlength=len(ids)), counts
