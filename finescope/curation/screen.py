"""The screen: a linear model of a document's n-grams that foretells its score, and the cut below which none is worth embedding.

It is fitted by ridge regression to the scores of documents drawn from the whole corpus, and to those of the seeds, without
which a rare domain would have next to no example. Each of the `FOLDS` parts of the sample is foretold by a model that has not
seen it; the screen is the mean of these models, so that what it says of a new document is on the scale of what they say of
theirs. The cut is one of the n scores that were so foretold of the best `top` of the sample: number floor((1 - recall) (n + 1))
from below. With one model that is split conformal prediction, and holds on the average for documents that are drawn like the
sample, whatever the model is worth; with the mean of five it is an estimate. The audit of the step is the measure.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from finescope.config_screen import ScreenSection
from finescope.curation.codes import Codes
from finescope.curation.ngrams import BUCKETS, hashed_ngrams

FOLDS = 5
# Weight of |w|^2 beside the sum of squared errors. Of 0.1 to 10, from 1 on the best are foretold worse (docs/benchmarks.md).
_RIDGE = 0.3
# Conjugate gradients: with such a ridge the residual falls below the tolerance, relative, in some twenty steps.
_MOST_STEPS, _TOLERANCE = 100, 1e-5
# Texts at a time: tens of MB of n-grams, however large a unit is.
_TEXTS = 1024
# Of a two-sided interval of 95 %.
_NORMAL_QUANTILE = 1.959964


@dataclass(frozen=True)
class Screen:
    """Says of each text by how much it exceeds the cut, for the one of D domains for which that is most."""

    weights: np.ndarray  # float32 [D, BUCKETS]
    bias: np.ndarray  # float64 [D]
    cut: np.ndarray  # float64 [D]; minus infinity: all pass
    characters: int  # of a text that are read

    def margins(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N]; a text whose margin is not negative passes."""
        parts = [np.zeros(0, np.float32)]
        for start in range(0, len(texts), _TEXTS):
            rows = hashed_ngrams(texts[start : start + _TEXTS], self.characters)
            values = rows.values.astype(np.float64)
            foretold = np.stack([rows.sum_rows(values * weights[rows.ids]) for weights in self.weights])
            parts.append((foretold + (self.bias - self.cut)[:, None]).max(axis=0).astype(np.float32))
        return np.concatenate(parts)

    def to_bytes(self, facts: Mapping[str, Any]) -> bytes:
        """As a safetensors file that holds `facts`, JSON values, too."""
        arrays = {"weights": self.weights, "bias": self.bias, "cut": self.cut, "characters": np.array([self.characters])}
        return save({**arrays, "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)})

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple["Screen", dict[str, Any]]:
        """What `to_bytes` wrote."""
        arrays = load(data)
        screen = cls(arrays["weights"], arrays["bias"], arrays["cut"], int(arrays["characters"][0]))
        return screen, json.loads(arrays["facts"].tobytes())


class Foretold(NamedTuple):
    """One domain's linear model, and what it says of the sample."""

    weights: np.ndarray  # float64 [BUCKETS]
    bias: float
    scores: np.ndarray  # float64 [N], of each document by models that have not seen it


class Cut(NamedTuple):
    """Where the screen of a domain cuts, and what of the sample passes there, foretold as if it were new."""

    value: float
    share: float  # of the sample
    recall: float  # of the best of the sample
    best: int  # documents of the sample that count as the best


def foretell(sample: Codes, scores: np.ndarray, seeds: Codes, seed_scores: np.ndarray, seed: int) -> Foretold:
    """Fit to a sample whose scores [N] are known, and to the seeds. N-grams of both as `hashed_ngrams` makes them."""
    rows = Codes.concatenated([sample, seeds])
    targets = np.concatenate([scores, seed_scores]).astype(np.float64)
    fold = np.full(len(rows), FOLDS)  # seeds are in every model
    fold[: len(sample)] = np.random.default_rng(seed).permutation(len(sample)) % FOLDS
    held_out = np.zeros(len(sample))
    weights, bias = np.zeros(BUCKETS), 0.0
    for number in range(FOLDS):
        seen = (fold != number).astype(np.float64)
        mean = float((seen * targets).sum() / seen.sum())
        found = ridge(rows, targets - mean, seen, _RIDGE)
        weights, bias = weights + found / FOLDS, bias + mean / FOLDS
        said = rows.sum_rows(rows.values * found[rows.ids]) + mean
        held_out = np.where(fold[: len(sample)] == number, said[: len(sample)], held_out)
    return Foretold(weights, bias, held_out)


def ridge(rows: Codes, targets: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    """The w of least sum_i weight_i (x_i.w - target_i)^2 + penalty |w|^2, float64 [num_latents]; by conjugate gradients on the
    normal equations (CGLS), which sum in one order, however many threads there are.
    """
    values, lengths = rows.values.astype(np.float64), np.diff(rows.offsets)

    def transposed(residual: np.ndarray) -> np.ndarray:
        return np.bincount(rows.ids, weights=values * np.repeat(weight * residual, lengths), minlength=rows.num_latents)

    found, residual = np.zeros(rows.num_latents), targets.astype(np.float64)
    gradient = transposed(residual)
    direction, square = gradient, (gradient * gradient).sum()
    enough = square * _TOLERANCE**2
    for _ in range(_MOST_STEPS):
        if square <= enough:
            break
        moved = rows.sum_rows(values * direction[rows.ids])
        step = square / ((weight * moved * moved).sum() + penalty * (direction * direction).sum())
        found = found + step * direction
        residual = residual - step * moved
        gradient = transposed(residual) - penalty * found
        before, square = square, (gradient * gradient).sum()
        direction = gradient + square / before * direction
    return found


def cut_of(foretold: np.ndarray, scores: np.ndarray, section: ScreenSection) -> Cut:
    """The cut for a sample's scores [N] and what was foretold of them [N]. Of equal scores the first is the better one."""
    count = len(scores)
    best = foretold[np.argsort(-scores, kind="stable")[: max(1, math.ceil(section.top * count - 1e-9))]]
    if section.share is not None:
        kept = math.ceil(section.share * count - 1e-9)
        value = -math.inf if kept >= count else float(np.sort(foretold)[count - kept])
    else:
        rank = math.floor((1 - section.recall) * (len(best) + 1) + 1e-9)
        value = -math.inf if rank < 1 else float(np.sort(best)[rank - 1])
    return Cut(value, float((foretold >= value).mean()), float((best >= value).mean()), len(best))


class Recall(NamedTuple):
    """How many of the documents that score as high as the worst of the best M that passed did pass."""

    recall: float
    at_least: float  # the lower end of an interval of 95 %
    at_most: float


def recall_of(passed: int, above: int, audited: int, stopped: int) -> Recall:
    """Of a sample of `audited` of the `stopped` documents `above` reach a score that `passed` of the others reach.

    Wilson's interval (JASA 22, 1927) is that of the share of those that were not looked at; of the others it is known.
    """
    assert 0 <= above <= audited <= stopped
    if audited == 0:
        return Recall(1.0, passed / (passed + stopped), 1.0)
    share, square = above / audited, _NORMAL_QUANTILE**2
    unseen = (stopped - audited) / stopped
    middle = (share + square / (2 * audited)) / (1 + square / audited)
    half = _NORMAL_QUANTILE / (1 + square / audited) * math.sqrt(share * (1 - share) / audited + square / (4 * audited**2))
    most, least = min(1.0, middle + half), max(0.0, middle - half)
    missed = [above + unseen * stopped * value for value in (share, most, least)]
    return Recall(*(passed / (passed + value) if passed + value else 1.0 for value in missed))
