"""Score documents by their codes' likeness to the seeds' (paper, section on domain-specific data curation).

The paper's score is s(x) = max over seeds t of cos(z(x), z(t)): `similarity: max, weighting: none`. The similarity says how
the cosines c_t of the S seeds become one number: `max`, `mean`, `softmax`, T log(mean over t of exp(c_t / T)), which is the one
for a temperature T near zero and the other for a large one, or `balanced`: the cosine with the direction that is about equally
like all seeds, so that seeds which resemble each other do not count as often as there are of them. The weightings change the
vectors that are compared:

* `idf`: z_j * log((1 + N) / (1 + n_j)), n_j the documents of the corpus in which latent j is active;
* `centred`: sqrt(z / sum z) less its mean over the corpus. A latent that fires on everything then says nothing;
* `contrast`: a logistic regression (`curation/contrast.py`) on the same vectors, seeds against a sample of the corpus. The score
  is the cosine of its weights with the document; there is one direction for all seeds, so that the similarity has no say.

The default is `balanced` and `centred`: the best of those measured on four domains (docs/benchmarks.md).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from finescope.curation.codes import Codes, CorpusStatistics, normalise
from finescope.curation.contrast import fit_contrast

Similarity = Literal["balanced", "max", "mean", "softmax"]
Weighting = Literal["none", "idf", "centred", "contrast"]
# Latents named as the reason of a score.
TOP_LATENTS = 8
# Roots of codes have unit norm in float32: a difference of two below it is rounding.
_ROUNDING = 1e-6
# Of `balanced`, beside cosines of seeds of at most 1. Of 0.02 to 1 the ranking hardly differs (docs/benchmarks.md).
_SEED_RIDGE = 0.1
# Documents at a time, times seeds: with 128 latents each some 100 MB of intermediate values, however large a shard is.
_ROWS_TIMES_SEEDS = 40_960


@dataclass(frozen=True)
class Scored:
    """Scores of N documents."""

    score: np.ndarray  # float32 [N]
    seed: np.ndarray  # int32 [N], the nearest seed
    top_latents: pa.Array  # list<int32> [N], shared with that seed: those that add most to the score, best first


class _Directions(NamedTuple):
    """Unit vectors that documents are compared with. Products with the mean are made where the seeds are, once: how many
    threads a worker has moves the last bits of a long one."""

    vectors: np.ndarray  # float64 [num_latents, S]
    with_mean: np.ndarray | None  # float64 [S]


class Scorer:
    """The seeds' side of the score, made once; then called with any number of documents' codes."""

    def __init__(
        self,
        seeds: Codes,
        statistics: CorpusStatistics,
        similarity: Similarity,
        weighting: Weighting,
        temperature: float,
        background: Codes | None,
    ) -> None:
        """`background`: codes of a sample of the corpus, for `contrast`."""
        assert len(seeds) > 0
        self._similarity, self._weighting, self._temperature = similarity, weighting, temperature
        count = max(statistics.documents, 1)
        self._mean = statistics.sqrt_sum / count if weighting in ("centred", "contrast") else None
        self._mean_square = 0.0 if self._mean is None else float(self._mean @ self._mean)
        self._idf = np.log((1 + count) / (1 + statistics.active)).astype(np.float32)
        vectors = _units(self._vectors(seeds))  # [S, num_latents]
        self._directions = self._compared(vectors.T)  # S of them
        weights: np.ndarray | None = None  # the one direction of `contrast` or `balanced`
        if weighting == "contrast":
            assert background is not None
            weights = fit_contrast(vectors, _units(self._vectors(background)))
        elif similarity == "balanced":
            weights = balanced(vectors)
        self._weights: _Directions | None = None
        if weights is not None:
            weights[np.abs(weights) < _ROUNDING] = 0.0
            self._weights = self._compared(_units(weights[None]).T)

    def __call__(self, codes: Codes) -> Scored:
        """Scores, nearest seeds and reasons of `codes`."""
        rows = max(1, _ROWS_TIMES_SEEDS // self._directions.vectors.shape[1])
        parts = [self._score(part) for part in codes.slices(rows)] or [self._score(codes)]
        reasons = pa.concat_arrays([part.top_latents for part in parts])
        return Scored(np.concatenate([p.score for p in parts]), np.concatenate([p.seed for p in parts]), reasons)

    def _score(self, codes: Codes) -> Scored:
        cosines = self._cosines(codes, self._directions)  # [N, S]
        nearest = cosines.argmax(axis=1)
        if self._weights is not None:
            score = self._cosines(codes, self._weights)[:, 0]
        elif self._similarity == "max":
            score = cosines.max(axis=1)
        elif self._similarity == "mean":
            score = cosines.mean(axis=1)
        else:
            score = _softmax(cosines, self._temperature)
        return Scored(score.astype(np.float32), nearest.astype(np.int32), self._reasons(codes, nearest))

    def _transform(self, codes: Codes) -> Codes:
        if self._weighting == "none":
            return codes
        if self._weighting == "idf":
            return codes.with_values(codes.values * self._idf[codes.ids])
        shares = normalise(codes)
        return shares.with_values(np.sqrt(shares.values))

    def _vectors(self, codes: Codes) -> np.ndarray:
        """What is compared, dense, for few codes; float64 [N, num_latents]."""
        dense = self._transform(codes).dense().astype(np.float64)
        if self._mean is not None:
            dense -= self._mean
            # Where a code is the corpus's mean there is no direction; what float32 leaves of one would become a reason.
            dense[np.abs(dense) < _ROUNDING] = 0.0
        return dense

    def _compared(self, vectors: np.ndarray) -> "_Directions":
        return _Directions(vectors, None if self._mean is None else self._mean @ vectors)

    def _cosines(self, codes: Codes, directions: "_Directions") -> np.ndarray:
        """cos(x, t) for each document and unit vector of `directions`, from the sparse entries; [N, S]."""
        transformed = self._transform(codes)
        values = transformed.values.astype(np.float64)
        dots = transformed.sum_rows(directions.vectors[codes.ids] * values[:, None])
        squares = transformed.sum_rows(values**2)
        if self._mean is not None:
            # (x - m).t = x.t - m.t and |x - m|^2 = |x|^2 - 2 x.m + |m|^2: the dense mean never meets a document.
            dots -= directions.with_mean
            squares += self._mean_square - 2 * transformed.sum_rows(values * self._mean[codes.ids])
        norms = np.sqrt(np.maximum(squares, 0.0))[:, None]
        empty = np.diff(codes.offsets) == 0
        cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        cosines[empty] = -1.0  # a document with no active latent resembles nothing
        return cosines

    def _reasons(self, codes: Codes, nearest: np.ndarray) -> pa.Array:
        """Of the latents that a document and its nearest seed have in common, those with the largest part in the score."""
        owner = np.repeat(np.arange(len(codes)), np.diff(codes.offsets))
        gains = self._directions.vectors[codes.ids, nearest[owner]]
        if self._weights is not None:
            # A direction is positive only where the seed has the latent, and more of it than the corpus.
            gains = np.where(gains > 0, self._weights.vectors[codes.ids, 0], 0.0)
        gains = self._transform(codes).values * gains
        order = np.lexsort((codes.ids, -gains, owner))
        place = np.arange(len(order)) - codes.offsets[owner]
        kept = (place < TOP_LATENTS) & (gains[order] > 0)
        counts = np.bincount(owner[kept], minlength=len(codes))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes.ids[order][kept].astype(np.int32)))


def balanced(seeds: np.ndarray) -> np.ndarray:
    """The w of the least sum over seeds t of (w.t - 1)^2 + `_SEED_RIDGE` |w|^2: a sum of seeds, each the less the more the others
    are like it (ridge regression in its dual form).

    Args:
        seeds: float64 [S, num_latents], rows of at most unit length.

    Returns:
        w, float64 [num_latents].
    """
    likeness = seeds @ seeds.T + _SEED_RIDGE * np.eye(len(seeds))
    return np.linalg.solve(likeness, np.ones(len(seeds))) @ seeds


def _units(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit length; a row of zeros stays one."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _softmax(cosines: np.ndarray, temperature: float) -> np.ndarray:
    """T log(mean exp(c / T)) over the last axis, with the largest taken out, so that nothing overflows."""
    largest = cosines.max(axis=1, keepdims=True)
    return largest[:, 0] + temperature * np.log(np.exp((cosines - largest) / temperature).mean(axis=1))
