"""The weighting `contrast`: an L2-regularised logistic regression, seeds against a sample of the corpus."""

import hashlib
from collections.abc import Sequence

import numpy as np

# Weight of |w|^2 beside the mean loss of each side. Of 0.001 to 1, from 0.01 on the ranking hardly differs (docs/benchmarks.md).
_RIDGE = 0.03
# The step is 1 / curvature of a loss whose condition is known: this many steps leave a gradient of rounding.
_STEPS = 200
# Documents of the sample, about: a linear model with so few positives gains nothing from more.
BACKGROUND = 2048


def fit_contrast(seeds: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The weights w of the least mean log(1 + exp(-(w.p + b))) over the seeds p plus mean log(1 + exp(w.n + b)) over the
    background n plus `_RIDGE` |w|^2. Both sides weigh the same, however few seeds there are.

    Background documents of the domain are labelled wrongly; as they are few, they shorten w more than they turn it.

    Args:
        seeds: float64 [S, num_latents], rows of at most unit length.
        background: float64 [N, num_latents], the same.

    Returns:
        w, float64 [num_latents].
    """
    rows = np.concatenate([seeds, background])
    sign = np.concatenate([np.ones(len(seeds)), -np.ones(len(background))])
    share = np.concatenate([np.full(len(seeds), 1 / len(seeds)), np.full(len(background), 1 / max(len(background), 1))])
    # Nesterov's method for a smooth, strongly convex function: curvature at most 1/4 of sum share * (|x|^2 + 1), plus the ridge.
    most, least = 0.25 * 2 * share.sum() + 2 * _RIDGE, 2 * _RIDGE
    momentum = (np.sqrt(most) - np.sqrt(least)) / (np.sqrt(most) + np.sqrt(least))
    weights, bias = np.zeros(rows.shape[1]), 0.0
    ahead, bias_ahead = weights, bias
    for _ in range(_STEPS):
        # d/dm log(1 + exp(-m)) = -1 / (1 + exp(m)) at the margin m.
        pull = -sign * share / (1 + np.exp(sign * (rows @ ahead + bias_ahead)))
        stepped = ahead - (rows.T @ pull + 2 * _RIDGE * ahead) / most
        bias_stepped = bias_ahead - float(pull.sum()) / most
        ahead, bias_ahead = stepped + momentum * (stepped - weights), bias_stepped + momentum * (bias_stepped - bias)
        weights, bias = stepped, bias_stepped
    return weights


def drawn(doc_ids: Sequence[str], documents: int) -> np.ndarray:
    """Which documents belong to the sample: bool [N], about `BACKGROUND` of all `documents`; all of a smaller corpus.

    A document is drawn by the hash of its id alone, so that neither shards nor runners have a say.
    """
    bound = int(min(1.0, BACKGROUND / max(documents, 1)) * 2**64)
    hashes = (hashlib.blake2b(doc_id.encode(), digest_size=8).digest() for doc_id in doc_ids)
    return np.array([int.from_bytes(value, "big") < bound for value in hashes], bool)
