"""The sparse scorer against the formulas of its module, computed densely and one document at a time."""

import numpy as np
import pytest
from curation_codes import NUM_LATENTS, codes_from, matrices
from hypothesis import given, settings
from hypothesis import strategies as st

from finescope.curation.codes import CorpusStatistics
from finescope.curation.score import TOP_LATENTS, Scored, Scorer, Weighting

WEIGHTINGS: tuple[Weighting, ...] = ("none", "idf", "centred", "contrast")


def roots(matrix: np.ndarray) -> np.ndarray:
    totals = matrix.sum(axis=1, keepdims=True)
    return np.sqrt(np.divide(matrix, totals, out=np.zeros_like(matrix), where=totals > 0))


def idf(corpus: np.ndarray) -> np.ndarray:
    return np.log((1 + len(corpus)) / (1 + (corpus > 0).sum(axis=0)))


def naive_vectors(matrix: np.ndarray, corpus: np.ndarray, weighting: Weighting) -> np.ndarray:
    """The vectors that the cosine compares."""
    if weighting == "none":
        return matrix
    if weighting == "idf":
        return matrix * idf(corpus)
    return roots(matrix) - roots(corpus).mean(axis=0)


def naive_directions(seeds: np.ndarray, corpus: np.ndarray, weighting: Weighting) -> np.ndarray:
    vectors = naive_vectors(seeds, corpus, weighting)
    if weighting == "contrast":
        variance = roots(corpus).var(axis=0)
        vectors = vectors.mean(axis=0, keepdims=True) / (variance + max(variance.mean(), 1e-12))
    return vectors


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 1e-7 else 0.0


def naive_cosines(documents: np.ndarray, seeds: np.ndarray, corpus: np.ndarray, weighting: Weighting) -> np.ndarray:
    directions = naive_directions(seeds, corpus, weighting)
    vectors = naive_vectors(documents, corpus, weighting)
    found = [[cosine(vector, direction) for direction in directions] for vector in vectors]
    return np.where(documents.any(axis=1)[:, None], np.array(found).reshape(len(documents), len(directions)), -1.0)


def scored(documents: np.ndarray, seeds: np.ndarray, corpus: np.ndarray, weighting: Weighting, similarity: str = "max") -> Scored:
    statistics = CorpusStatistics.of(codes_from(corpus))
    return Scorer(codes_from(seeds), statistics, similarity, weighting)(codes_from(documents))  # pyright: ignore[reportArgumentType]


def naive_gains(document: np.ndarray, direction: np.ndarray, weighting: Weighting, corpus: np.ndarray) -> np.ndarray:
    """What each latent of a document adds to its dot product with a direction."""
    values = {"none": document, "idf": document * idf(corpus)}.get(weighting, roots(document[None])[0])
    return values * direction / (np.linalg.norm(direction) or 1.0)


def nontrivial(vectors: np.ndarray) -> bool:
    """Whether each vector is either zero or well away from it, so that its direction is more than rounding."""
    norms = np.linalg.norm(vectors, axis=1)
    return bool(np.all((norms == 0) | (norms > 1e-3)))


@pytest.mark.parametrize("similarity", ["max", "mean"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_scores_are_the_naive_ones(weighting: Weighting, similarity: str, data: st.DataObject):
    corpus = data.draw(matrices(1, 7)).astype(np.float64)
    seeds = data.draw(matrices(1, 4)).astype(np.float64)
    found = scored(corpus, seeds, corpus, weighting, similarity)
    assert (found.score.dtype, found.seed.dtype) == (np.float32, np.int32)
    assert np.isfinite(found.score).all()
    if not nontrivial(naive_vectors(corpus, corpus, weighting)) or not nontrivial(naive_directions(seeds, corpus, weighting)):
        return
    cosines = naive_cosines(corpus, seeds, corpus, weighting)
    expected = cosines.max(axis=1) if similarity == "max" else cosines.mean(axis=1)
    np.testing.assert_allclose(found.score, expected, atol=1e-5)
    if weighting == "contrast":
        cosines = roots(corpus) @ roots(seeds).T
    np.testing.assert_allclose(cosines[np.arange(len(corpus)), found.seed], cosines.max(axis=1), atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_top_latents_are_the_largest_contributions(weighting: Weighting, data: st.DataObject):
    corpus = data.draw(matrices(2, 6)).astype(np.float64)
    seeds = data.draw(matrices(1, 3)).astype(np.float64)
    found = scored(corpus, seeds, corpus, weighting)
    directions = naive_directions(seeds, corpus, weighting)
    if not nontrivial(directions):
        return
    for row, named in enumerate(found.top_latents.to_pylist()):
        gains = naive_gains(corpus[row], directions[found.seed[row] if len(directions) > 1 else 0], weighting, corpus)
        if np.any((gains > 0) & (gains < 1e-6)):
            continue  # a product that is rounding alone may be named or not
        assert len(named) == len(set(named))
        assert gains[named] == pytest.approx(sorted(gains[gains > 0], reverse=True)[:TOP_LATENTS], rel=1e-4)


def test_what_seeds_and_corpus_share_is_no_reason():
    """Seeds and corpus differ in the second document only: latents 2 to 5 have the same means, in another order of summing."""
    first, last = [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]
    seeds = 0.25 * np.array([first, [0, 1, 1, 1, 1, 1], last], np.float64)
    corpus = 0.25 * np.array([first, [1, 0, 1, 1, 1, 1], last], np.float64)
    found = scored(corpus, seeds, corpus, "contrast")
    assert found.top_latents.to_pylist() == [[], [], [1]]
    same = scored(corpus, corpus[::-1], corpus, "contrast")
    assert same.score.tolist() == [0.0] * 3


def test_the_papers_score_by_hand():
    """s(x) = max over seeds of cos(z(x), z(t))."""
    seeds = np.array([[3.0, 4.0, 0, 0, 0, 0], [0, 0, 2.0, 0, 0, 0]])
    documents = np.array([[1.0, 0, 0, 0, 0, 0], [0, 0, 9.0, 0, 0, 0], [0, 0, 0, 1.0, 0, 0], [6.0, 8.0, 1.0, 0, 0, 0]])
    found = scored(documents, seeds, documents, "none")
    assert found.score.tolist() == pytest.approx([0.6, 1.0, 0.0, 10 / 101**0.5])
    assert found.seed.tolist() == [0, 1, 0, 0]
    assert found.top_latents.to_pylist() == [[0], [2], [], [1, 0]]
    mean = scored(documents, seeds, documents, "none", "mean")
    assert mean.score.tolist() == pytest.approx([0.3, 0.5, 0.0, 5.5 / 101**0.5])


def test_idf_by_hand():
    """Latent 0 is in all three documents: log(4 / 4) = 0, so that what has nothing else resembles nothing."""
    corpus = np.array([[1.0, 0, 0, 0, 0, 0], [1.0, 1.0, 0, 0, 0, 0], [5.0, 0, 1.0, 0, 0, 0]])
    found = scored(corpus, corpus[1:2], corpus, "idf")
    assert found.score.tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert found.top_latents.to_pylist() == [[], [1], []]


def test_centred_by_hand():
    """Two documents, each a latent of its own: the mean is half of each, so that they point away from each other."""
    corpus = np.array([[2.0, 0, 0, 0, 0, 0], [0, 7.0, 0, 0, 0, 0]])
    found = scored(corpus, corpus[:1], corpus, "centred")
    assert found.score.tolist() == pytest.approx([1.0, -1.0])
    assert found.top_latents.to_pylist() == [[0], []]


def test_contrast_by_hand():
    """Latent 0 differs much between documents, latent 1 not at all: by its precision, latent 1 of the seeds weighs more."""
    corpus = np.array([[1.0, 1.0, 0, 0, 0, 0], [0, 1.0, 1.0, 0, 0, 0]])
    mean, half = np.array([0.5**0.5 / 2, 0.5**0.5, 0.5**0.5 / 2]), 0.5**0.5
    variance = np.array([1 / 8, 0, 1 / 8])
    seed = np.array([half, half, 0]) - mean
    direction = seed / (variance + (1 / 8 + 1 / 8) / NUM_LATENTS)
    expected = [cosine(np.array([half, half, 0]) - mean, direction), cosine(np.array([0, half, half]) - mean, direction)]
    found = scored(corpus, corpus[:1], corpus, "contrast")
    assert found.score.tolist() == pytest.approx(expected)
    assert expected[0] == pytest.approx(1.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_empty_codes_are_last_and_break_nothing(weighting: Weighting):
    corpus = np.zeros((4, NUM_LATENTS))
    corpus[1, :2], corpus[2, 2] = 1.0, 3.0
    found = scored(corpus, corpus[1:2], corpus, weighting)
    assert found.score[[0, 3]].tolist() == [-1.0, -1.0]
    assert found.score[1] > max(found.score[2], -0.99)
    assert found.top_latents.to_pylist()[0] == []
    nothing = scored(corpus[:0], corpus[1:2], corpus, weighting)
    assert (len(nothing.score), len(nothing.seed), len(nothing.top_latents)) == (0, 0, 0)
    only_empty = scored(corpus[[0, 3]], corpus[1:2], corpus, weighting)
    assert only_empty.score.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_score_does_not_depend_on_the_documents_beside_it(weighting: Weighting):
    corpus = np.random.default_rng(0).integers(0, 3, (9, NUM_LATENTS)).astype(float)
    whole = scored(corpus, corpus[:2], corpus, weighting)
    for row in range(len(corpus)):
        alone = scored(corpus[row : row + 1], corpus[:2], corpus, weighting)
        assert alone.score[0] == whole.score[row]
        assert alone.top_latents.to_pylist()[0] == whole.top_latents.to_pylist()[row]


def test_at_most_eight_latents_best_first_ties_by_id():
    codes = np.zeros((1, 12))
    codes[0] = [1, 5, 1, 1, 1, 1, 1, 1, 9, 1, 1, 1]
    found = scored(codes, codes, codes, "none")
    assert found.top_latents.to_pylist() == [[8, 1, 0, 2, 3, 4, 5, 6]]
