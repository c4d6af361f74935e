"""Small random codes, dense and sparse, for the curation tests."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from finescope.curation.codes import Codes

NUM_LATENTS = 6


def matrices(least: int, most: int) -> st.SearchStrategy[np.ndarray]:
    """float32 [N, NUM_LATENTS] of what f16 holds exactly: many zeros, whole rows and columns of them, and ties."""
    values = st.sampled_from([0.0, 0.0, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0, 40.0])
    return st.integers(least, most).flatmap(lambda rows: hnp.arrays(np.float32, (rows, NUM_LATENTS), elements=values))


def codes_from(matrix: np.ndarray) -> Codes:
    """The entries that are not zero."""
    rows, ids = np.nonzero(matrix)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return Codes(offsets, ids.astype(np.int32), matrix[rows, ids].astype(np.float32), matrix.shape[1])


def dense_of(codes: Codes) -> np.ndarray:
    """One entry after the other."""
    matrix = np.zeros((len(codes), codes.num_latents), np.float32)
    for row in range(len(codes)):
        for latent, value in zip(*codes.row(row), strict=True):
            matrix[row, latent] = value
    return matrix
