"""Greedy maximal marginal relevance (Carbonell and Goldstein 1998) over document codes.

The next document is the one with the largest (1 - diversity) * score - diversity * (similarity to the nearest one that is
taken already). The similarity of two codes is the Bhattacharyya coefficient, sum over latents of sqrt(p_j q_j), p and q the
codes divided by their sums: the cosine of their square roots, between 0 and 1.

Each document that is taken updates the similarities of all others through the documents of each latent of its code, so
that a pair costs the few latents that it shares. The choice is that of the naive greedy one, exactly.
"""

import numpy as np

from finescope.curation.codes import Codes, normalise


class MarginalRelevance:
    """P candidates, best score first. 16 bytes an entry of their codes."""

    def __init__(self, scores: np.ndarray, codes: Codes, diversity: float) -> None:
        """`scores` float [P], `codes` of P documents."""
        self._relevance = (1 - diversity) * scores.astype(np.float64)
        self._diversity = diversity
        self._roots = np.sqrt(normalise(codes).values.astype(np.float64))  # of each entry
        self._codes = codes
        order = np.argsort(codes.ids, kind="stable")
        self._starts = np.searchsorted(codes.ids[order], np.arange(codes.num_latents + 1))
        owners = np.repeat(np.arange(len(codes), dtype=np.int32), np.diff(codes.offsets))
        self._documents, self._values = owners[order], self._roots[order]  # by latent
        self._left = np.ones(len(codes), bool)
        self.similarity = np.zeros(len(codes))  # float64 [P], to the nearest that is taken; 0.0 while there is none
        self.nearest = np.full(len(codes), -1)  # int [P], which one that is; -1: none with a latent in common

    def best(self) -> int | None:
        """The candidate to take next, of equals the one with the better score; None: none is left."""
        if not self._left.any():
            return None
        value = self._relevance - self._diversity * self.similarity
        return int(np.where(self._left, value, -np.inf).argmax())

    def drop(self, index: int) -> None:
        """Leave a candidate out, without effect on the others."""
        self._left[index] = False

    def take(self, index: int) -> None:
        """Take a candidate: what resembles it loses by that."""
        self._left[index] = False
        ids, _ = self._codes.row(index)
        if len(ids) == 0:
            return
        mine = self._roots[self._codes.offsets[index] : self._codes.offsets[index + 1]]
        spans = [slice(self._starts[latent], self._starts[latent + 1]) for latent in ids]
        documents = np.concatenate([self._documents[span] for span in spans])
        products = np.concatenate([value * self._values[span] for value, span in zip(mine, spans, strict=True)])
        similarity = np.bincount(documents, weights=products, minlength=len(self._codes))
        nearer = similarity > self.similarity
        self.similarity[nearer] = similarity[nearer]
        self.nearest[nearer] = index
