import numpy as np
import pytest
from curation_codes import codes_from, dense_of, matrices
from hypothesis import given
from hypothesis import strategies as st

from finescope.curation.diversity import MarginalRelevance


def naive(scores: np.ndarray, matrix: np.ndarray, diversity: float, count: int) -> list[float]:
    """The values of the documents that the greedy choice takes, by the definition."""
    matrix = matrix.astype(np.float64)
    shares = np.divide(matrix, matrix.sum(1, keepdims=True), out=np.zeros_like(matrix), where=matrix.sum(1, keepdims=True) > 0)
    similarity = np.sqrt(shares) @ np.sqrt(shares).T
    taken: list[int] = []
    values = []
    for _ in range(count):
        left = [index for index in range(len(scores)) if index not in taken]
        nearest = [max((similarity[index, other] for other in taken), default=0.0) for index in left]
        value = [(1 - diversity) * scores[index] - diversity * near for index, near in zip(left, nearest, strict=True)]
        taken.append(left[int(np.argmax(value))])
        values.append(max(value))
    return values


@given(matrices(1, 12), st.sampled_from([0.0, 0.3, 0.7, 0.99]), st.integers(0, 99))
def test_the_choice_is_that_of_the_naive_greedy(matrix: np.ndarray, diversity: float, seed: int) -> None:
    scores = np.sort(np.random.default_rng(seed).normal(size=len(matrix)))[::-1].astype(np.float32)
    order = MarginalRelevance(scores, codes_from(matrix), diversity)
    values = []
    while (best := order.best()) is not None:
        values.append((1 - diversity) * float(scores[best]) - diversity * order.similarity[best])
        order.take(best)
    # Values, not documents: of documents that are as good but for rounding either may come first.
    assert values == pytest.approx(naive(scores, dense_of(codes_from(matrix)), diversity, len(matrix)), abs=1e-6)


def test_by_hand() -> None:
    """Codes (1, 0), (1, 0), (0, 1), (1, 1): similarities to the first 1, 0 and the root of 1/2."""
    codes = codes_from(np.array([[1, 0], [2, 0], [0, 3], [1, 1]], np.float32))
    order = MarginalRelevance(np.array([1.0, 0.9, 0.5, 0.6]), codes, 0.5)
    assert order.best() == 0
    order.take(0)
    assert order.similarity.tolist() == pytest.approx([1, 1, 0, 0.5**0.5])
    # 0.45 - 0.5, 0.25 - 0, 0.3 - 0.354
    assert order.best() == 2
    order.take(2)
    assert order.nearest.tolist() == [0, 0, 2, 0]
    assert order.best() == 1
    order.drop(1)
    assert order.best() == 3
    order.drop(3)
    assert order.best() is None


def test_equal_documents_go_by_rank() -> None:
    order = MarginalRelevance(np.array([0.5, 0.5, 0.5]), codes_from(np.ones((3, 2), np.float32)), 0.5)
    for expected in range(3):
        assert order.best() == expected
        order.take(expected)
