"""Score documents by their codes' likeness to the seeds' (paper, section on domain-specific data curation).

The paper's score is s(x) = max over seeds t of cos(z(x), z(t)): `similarity: max, weighting: none`. The weightings
change the vectors that the cosine compares:

* `idf`: z_j * log((1 + N) / (1 + n_j)), n_j the documents of the corpus in which latent j is active;
* `centred`: sqrt(z / sum z) less its mean over the corpus. A latent that fires on everything then says nothing;
* `contrast`: a regularised linear discriminant, seeds against the corpus background: the score is the projection of
  the centred code on the seeds' centred mean, each latent divided by its variance over the corpus plus a ridge.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from finescope.curation.codes import Codes, CorpusStatistics, normalise

Weighting = Literal["none", "idf", "centred", "contrast"]
# Latents named as the reason of a score.
TOP_LATENTS = 8
# Ridge of `contrast`, as a share of the mean variance of a latent.
_RIDGE = 1.0
# Roots of codes have unit norm in float32: a difference of two below it is rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Scored:
    """Scores of N documents."""

    score: np.ndarray  # float32 [N]
    seed: np.ndarray  # int32 [N], the nearest seed
    top_latents: pa.Array  # list<int32> [N], the latents that add most to the likeness to that seed, best first


class Scorer:
    """The seeds' side of the score, made once; then called with any number of documents' codes."""

    def __init__(
        self, seeds: Codes, statistics: CorpusStatistics, similarity: Literal["max", "mean"], weighting: Weighting
    ) -> None:
        assert len(seeds) > 0
        self._similarity = similarity
        self._weighting: Weighting = weighting
        count = max(statistics.documents, 1)
        self._mean = statistics.sqrt_sum / count
        self._idf = np.log((1 + count) / (1 + statistics.active)).astype(np.float32)
        variance = np.maximum(statistics.share_sum / count - self._mean**2, 0.0)
        self._precision = 1.0 / (variance + _RIDGE * max(float(variance.mean()), 1e-12))
        dense = self._transform(seeds).dense().astype(np.float64)
        if weighting in ("centred", "contrast"):
            dense -= self._mean
        if weighting == "contrast":
            dense = dense.mean(axis=0, keepdims=True)
        if weighting in ("centred", "contrast"):
            # Where seeds are the corpus's mean there is no direction; what float32 leaves of one would become a reason.
            dense[np.abs(dense) < _ROUNDING] = 0.0
        if weighting == "contrast":
            dense *= self._precision
        norms = np.linalg.norm(dense, axis=1, keepdims=True)
        self._directions = np.divide(dense, norms, out=np.zeros_like(dense), where=norms > 0).T  # [num_latents, S]
        self._seed_roots = self._transform(seeds).dense().astype(np.float64)  # for the nearest seed under `contrast`

    def __call__(self, codes: Codes) -> Scored:
        """Scores, nearest seeds and reasons of `codes`."""
        cosines = self._cosines(codes)  # [N, S]
        nearest = self._nearest(codes, cosines)
        score = cosines.max(axis=1) if self._similarity == "max" else cosines.mean(axis=1)
        return Scored(score.astype(np.float32), nearest.astype(np.int32), self._reasons(codes, nearest))

    def _transform(self, codes: Codes) -> Codes:
        if self._weighting == "none":
            return codes
        if self._weighting == "idf":
            return codes.with_values(codes.values * self._idf[codes.ids])
        shares = normalise(codes)
        return shares.with_values(np.sqrt(shares.values))

    def _cosines(self, codes: Codes) -> np.ndarray:
        """cos(x, t) for each document and direction, from the sparse entries alone; float64 [N, S]."""
        transformed = self._transform(codes)
        values = transformed.values.astype(np.float64)
        dots = transformed.sum_rows(self._directions[codes.ids] * values[:, None])
        squares = transformed.sum_rows(values**2)
        if self._weighting in ("centred", "contrast"):
            # (x - m).t = x.t - m.t and |x - m|^2 = |x|^2 - 2 x.m + |m|^2: the dense mean never meets a document.
            dots -= self._mean @ self._directions
            squares += self._mean @ self._mean - 2 * transformed.sum_rows(values * self._mean[codes.ids])
        norms = np.sqrt(np.maximum(squares, 0.0))[:, None]
        empty = np.diff(codes.offsets) == 0
        cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        cosines[empty] = -1.0  # a document with no active latent resembles nothing
        return cosines

    def _nearest(self, codes: Codes, cosines: np.ndarray) -> np.ndarray:
        if self._weighting != "contrast":
            return cosines.argmax(axis=1)
        roots = self._transform(codes)
        entries = self._seed_roots.T[codes.ids] * roots.values[:, None]
        return roots.sum_rows(entries).argmax(axis=1)

    def _reasons(self, codes: Codes, nearest: np.ndarray) -> pa.Array:
        """The latents with the largest contributions to the dot product with the nearest seed."""
        owner = np.repeat(np.arange(len(codes)), np.diff(codes.offsets))
        direction = nearest[owner] if self._directions.shape[1] > 1 else 0  # `contrast` has one for all seeds
        gains = self._transform(codes).values * self._directions[codes.ids, direction]
        order = np.lexsort((codes.ids, -gains, owner))
        place = np.arange(len(order)) - codes.offsets[owner]
        kept = (place < TOP_LATENTS) & (gains[order] > 0)
        counts = np.bincount(owner[kept], minlength=len(codes))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes.ids[order][kept].astype(np.int32)))
