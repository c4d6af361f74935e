"""Score documents by their codes' likeness to the seeds' (paper, section on domain-specific data curation).

The paper's score is s(x) = max over seeds t of cos(z(x), z(t)): `similarity: max, weighting: none`. The similarity says how
the cosines c_t of the S seeds become one number: `max`, `mean`, `softmax`, T log(mean over t of exp(c_t / T)), which is the one
for a temperature T near zero and the other for a large one, or `balanced`: the cosine with the direction that is about equally
like all seeds, so that seeds which resemble each other do not count as often as there are of them. The weightings change the
vectors that are compared:

* `idf`: z_j * log((1 + N) / (1 + n_j)), n_j the documents of the corpus in which latent j is active;
* `centred`: sqrt(z / sum z) less its mean over the corpus. A latent that fires on everything then says nothing;
* `decoded`: sum over j of z_j d_j less its mean over the corpus, d_j the decoder's row of latent j in standardised coordinates:
  what the kept latents say of the mean activation. Latents that the dictionary has split, and whose rows are alike, then count
  as alike. All but a document's norm comes from products with vectors over the latents, as in the others;
* `contrast`: a logistic regression (`curation/contrast.py`) on the same vectors, seeds against a sample of the corpus. The score
  is the cosine of its weights with the document; there is one direction for all seeds, so that the similarity has no say.

The default is `balanced` and `decoded`: the best of those measured on four domains (docs/benchmarks.md).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from finescope.curation.codes import Codes, CorpusStatistics, normalise
from finescope.curation.contrast import fit_contrast

Similarity = Literal["balanced", "max", "mean", "softmax"]
Weighting = Literal["none", "idf", "centred", "decoded", "contrast"]
# Latents named as the reason of a score.
TOP_LATENTS = 8
# Roots of codes have unit norm in float32: a difference of two below it is rounding.
_ROUNDING = 1e-6
# Of `balanced`, beside cosines of seeds of at most 1. Of 0.02 to 0.2 the ranking hardly differs (docs/benchmarks.md).
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
    """Unit vectors that documents are compared with: the seeds' and, last, the one of `contrast` or `balanced`.

    Products with the mean are made where the seeds are, once: how many threads a worker has moves the last bits of a long one.
    """

    vectors: np.ndarray  # float64 [num_latents, S]; of `decoded`: each latent's product with them
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
        decoder: np.ndarray | None,
    ) -> None:
        """Make it.

        Args:
            background: codes of a sample of the corpus, for `contrast`.
            decoder: float32 [num_latents, C], in standardised coordinates, for `decoded`.
        """
        assert len(seeds) > 0
        assert (decoder is not None) == (weighting == "decoded")
        self._similarity, self._weighting, self._temperature, self._decoder = similarity, weighting, temperature, decoder
        count = max(statistics.documents, 1)
        sums = {"centred": statistics.sqrt_sum, "contrast": statistics.sqrt_sum, "decoded": statistics.value_sum}.get(weighting)
        self._mean = None if sums is None else sums / count
        self._mean_square = 0.0 if self._mean is None else float(self._mean @ self._mean)
        self._compared_mean = None if self._mean is None else self._compared_with(self._mean[None])[0]
        self._idf = np.log((1 + count) / (1 + statistics.active)).astype(np.float32)
        self._of_seeds = seeds.dense().T > 0  # [num_latents, S]
        vectors = _units(self._compared_with(self._vectors(seeds)))  # [S, num_latents], or [S, C]
        weights: np.ndarray | None = None  # the one direction of `contrast` or `balanced`
        if weighting == "contrast":
            assert background is not None
            weights = fit_contrast(vectors, _units(self._vectors(background)))
        elif similarity == "balanced":
            weights = balanced(vectors)
        self._weighted = weights is not None
        if weights is not None:
            weights[np.abs(weights) < _ROUNDING] = 0.0
            vectors = np.concatenate([vectors, _units(weights[None])])
        over_latents = vectors.T if decoder is None else decoder.astype(np.float64) @ vectors.T
        self._directions = _Directions(over_latents, None if self._mean is None else self._mean @ over_latents)

    def __call__(self, codes: Codes) -> Scored:
        """Scores, nearest seeds and reasons of `codes`."""
        rows = max(1, _ROWS_TIMES_SEEDS // self._directions.vectors.shape[1])
        parts = [self._score(part) for part in codes.slices(rows)] or [self._score(codes)]
        reasons = pa.concat_arrays([part.top_latents for part in parts])
        return Scored(np.concatenate([p.score for p in parts]), np.concatenate([p.seed for p in parts]), reasons)

    def _score(self, codes: Codes) -> Scored:
        found = self._cosines(codes)
        cosines = found[:, : self._of_seeds.shape[1]]  # [N, S]
        nearest = cosines.argmax(axis=1)
        if self._weighted:
            score = found[:, -1]
        elif self._similarity == "max":
            score = cosines.max(axis=1)
        elif self._similarity == "mean":
            score = cosines.mean(axis=1)
        else:
            score = _softmax(cosines, self._temperature)
        return Scored(score.astype(np.float32), nearest.astype(np.int32), self._reasons(codes, nearest))

    def _transform(self, codes: Codes) -> Codes:
        if self._weighting in ("none", "decoded"):
            return codes
        if self._weighting == "idf":
            return codes.with_values(codes.values * self._idf[codes.ids])
        shares = normalise(codes)
        return shares.with_values(np.sqrt(shares.values))

    def _vectors(self, codes: Codes) -> np.ndarray:
        """Weighted codes less the mean, dense, for few of them; float64 [N, num_latents]."""
        dense = self._transform(codes).dense().astype(np.float64)
        if self._mean is not None:
            dense -= self._mean
            # Where a code is the corpus's mean there is no direction; what float32 leaves of one would become a reason.
            dense[np.abs(dense) < _ROUNDING] = 0.0
        return dense

    def _compared_with(self, vectors: np.ndarray) -> np.ndarray:
        """From vectors over latents [N, num_latents] to those that are compared: themselves, or decoded [N, C]."""
        return vectors if self._decoder is None else vectors @ self._decoder.astype(np.float64)

    def _norms(self, codes: Codes) -> np.ndarray:
        """Of what is compared of each code; float64 [N]."""
        if self._decoder is not None:
            return self._decoded_norms(codes, self._decoder)
        values = codes.values.astype(np.float64)
        squares = codes.sum_rows(values**2)
        if self._mean is not None:
            # |x - m|^2 = |x|^2 - 2 x.m + |m|^2: the dense mean never meets a document.
            squares += self._mean_square - 2 * codes.sum_rows(values * self._mean[codes.ids])
        return np.sqrt(np.maximum(squares, 0.0))

    def _decoded_norms(self, codes: Codes, decoder: np.ndarray) -> np.ndarray:
        assert self._compared_mean is not None
        norms = np.full(len(codes), np.linalg.norm(self._compared_mean))
        for row in np.flatnonzero(np.diff(codes.offsets)).tolist():
            ids, values = codes.row(row)
            # Not a matrix product: how many threads one has moves its last bits. A row at a time stays in a cache.
            norms[row] = np.linalg.norm(np.einsum("k,kc->c", values, decoder[ids]) - self._compared_mean)
        return norms

    def _cosines(self, codes: Codes) -> np.ndarray:
        """cos(x, t) for each document and direction, from the sparse entries; [N, S], or [N, S + 1] with that of all seeds."""
        transformed = self._transform(codes)
        values = transformed.values.astype(np.float64)
        dots = transformed.sum_rows(self._directions.vectors[codes.ids] * values[:, None])
        if self._mean is not None:
            dots -= self._directions.with_mean  # (x - m).t = x.t - m.t
        norms = self._norms(transformed)[:, None]
        empty = np.diff(codes.offsets) == 0
        cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        cosines[empty] = -1.0  # a document with no active latent resembles nothing
        return cosines

    def _reasons(self, codes: Codes, nearest: np.ndarray) -> pa.Array:
        """Of the latents that a document and its nearest seed have in common, those with the largest part in the score."""
        owner = np.repeat(np.arange(len(codes)), np.diff(codes.offsets))
        gains = self._directions.vectors[codes.ids, nearest[owner]]
        if self._weighted:
            gains = np.where(gains > 0, self._directions.vectors[codes.ids, -1], 0.0)
        # A latent that the seed has not may speak for it too, where its decoder's row is like another's that it has.
        gains = np.where(self._of_seeds[codes.ids, nearest[owner]], gains, 0.0)
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
        seeds: float64 [S, D], rows of at most unit length; D latents, or coordinates where codes are decoded.

    Returns:
        w, float64 [D].
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
