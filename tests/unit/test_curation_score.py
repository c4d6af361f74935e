"""The sparse scorer against the formulas of its module, computed densely and one document at a time."""

import numpy as np
import pytest
from curation_codes import NUM_LATENTS, codes_from, matrices
from hypothesis import given, settings
from hypothesis import strategies as st

from finescope.curation.codes import CorpusStatistics
from finescope.curation.contrast import fit_contrast
from finescope.curation.score import TOP_LATENTS, Scored, Scorer, Similarity, Weighting

WEIGHTINGS: tuple[Weighting, ...] = ("none", "idf", "centred", "decoded", "contrast")
SIMILARITIES: tuple[Similarity, ...] = ("balanced", "max", "mean", "softmax")
TEMPERATURE = 0.2
# Of three coordinates: latents are alike here, as those that a dictionary has split.
DECODER = np.random.default_rng(0).standard_normal((NUM_LATENTS, 3)).astype(np.float32)


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
    if weighting == "decoded":
        return (matrix - corpus.mean(axis=0)) @ DECODER
    return roots(matrix) - roots(corpus).mean(axis=0)


def units(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(norms > 1e-5, vectors / np.maximum(norms, 1e-5), 0.0)


def naive_weights(seeds: np.ndarray, corpus: np.ndarray) -> np.ndarray:
    """The direction of `contrast`, with the whole corpus as the background; [1, num_latents]."""
    vectors = [units(naive_vectors(matrix, corpus, "contrast")) for matrix in (seeds, corpus)]
    return units(fit_contrast(*vectors)[None])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 1e-7 else 0.0


def naive_cosines(documents: np.ndarray, seeds: np.ndarray, corpus: np.ndarray, weighting: Weighting) -> np.ndarray:
    directions = naive_vectors(seeds, corpus, weighting)
    vectors = naive_vectors(documents, corpus, weighting)
    found = [[cosine(vector, direction) for direction in directions] for vector in vectors]
    return np.where(documents.any(axis=1)[:, None], np.array(found).reshape(len(documents), len(directions)), -1.0)


def naive_balanced(vectors: np.ndarray, seeds: np.ndarray, corpus: np.ndarray) -> np.ndarray:
    """Cosines with the ridge regression from the seeds to ones, in its primal form; [N]."""
    weights = np.linalg.solve(seeds.T @ seeds + 0.1 * np.eye(seeds.shape[1]), seeds.sum(axis=0))
    return np.where(corpus.any(axis=1), [cosine(vector, weights) for vector in vectors], -1.0)


def scored(
    documents: np.ndarray, seeds: np.ndarray, corpus: np.ndarray, weighting: Weighting, similarity: Similarity = "max"
) -> Scored:
    codes = codes_from(corpus)
    scorer = Scorer(
        codes_from(seeds),
        CorpusStatistics.of(codes),
        similarity,
        weighting,
        TEMPERATURE,
        codes,
        DECODER if weighting == "decoded" else None,
    )
    return scorer(codes_from(documents))


def naive_gains(document: np.ndarray, direction: np.ndarray, weighting: Weighting, corpus: np.ndarray) -> np.ndarray:
    """What each latent of a document adds to its dot product with a direction."""
    values = {"none": document, "idf": document * idf(corpus)}.get(weighting, roots(document[None])[0])
    if weighting == "decoded":
        values, direction = document, DECODER @ (direction / (np.linalg.norm(direction) or 1.0))
        return values * direction
    return values * direction / (np.linalg.norm(direction) or 1.0)


def nontrivial(vectors: np.ndarray) -> bool:
    """Whether each vector is either zero or well away from it, so that its direction is more than rounding."""
    norms = np.linalg.norm(vectors, axis=1)
    return bool(np.all((norms == 0) | (norms > 1e-3)))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_scores_are_the_naive_ones(weighting: Weighting, similarity: Similarity, data: st.DataObject):
    corpus = data.draw(matrices(1, 7)).astype(np.float64)
    seeds = data.draw(matrices(1, 4)).astype(np.float64)
    found = scored(corpus, seeds, corpus, weighting, similarity)
    assert (found.score.dtype, found.seed.dtype) == (np.float32, np.int32)
    assert np.isfinite(found.score).all()
    vectors = naive_vectors(corpus, corpus, weighting)
    if not nontrivial(vectors) or not nontrivial(naive_vectors(seeds, corpus, weighting)):
        return
    cosines = naive_cosines(corpus, seeds, corpus, weighting)
    expected = {
        "max": cosines.max(axis=1),
        "mean": cosines.mean(axis=1),
        "softmax": TEMPERATURE * np.log(np.exp(cosines / TEMPERATURE).mean(axis=1)),
        "balanced": naive_balanced(vectors, units(naive_vectors(seeds, corpus, weighting)), corpus),
    }[similarity]
    if weighting == "contrast":
        weights = naive_weights(seeds, corpus)
        if not nontrivial(weights):
            return
        expected = np.where(corpus.any(axis=1), [cosine(vector, weights[0]) for vector in vectors], -1.0)
    np.testing.assert_allclose(found.score, expected, atol=1e-5)
    np.testing.assert_allclose(cosines[np.arange(len(corpus)), found.seed], cosines.max(axis=1), atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_top_latents_are_the_largest_contributions(weighting: Weighting, data: st.DataObject):
    corpus = data.draw(matrices(2, 6)).astype(np.float64)
    seeds = data.draw(matrices(1, 3)).astype(np.float64)
    found = scored(corpus, seeds, corpus, weighting)
    directions = naive_vectors(seeds, corpus, weighting)
    if not nontrivial(directions):
        return
    weights = naive_weights(seeds, corpus) if weighting == "contrast" else None
    for row, named in enumerate(found.top_latents.to_pylist()):
        direction = directions[found.seed[row]]
        assert np.all(seeds[found.seed[row]][named] > 0), "a reason is shared"
        if weights is not None:
            direction = np.where(direction > 1e-6, weights[0], 0.0)
        gains = naive_gains(corpus[row], direction, weighting, corpus) * (seeds[found.seed[row]] > 0)
        if np.any((gains > 0) & (gains < 1e-6)):
            continue  # a product that is rounding alone may be named or not
        assert len(named) == len(set(named))
        assert gains[named] == pytest.approx(sorted(gains[gains > 0], reverse=True)[:TOP_LATENTS], rel=1e-4)


def test_seeds_that_are_the_corpus_give_no_direction():
    """The same four documents on both sides, summed in another order: what float32 leaves of a difference is no reason."""
    corpus = 0.25 * np.array([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1], [0, 3, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], np.float64)
    found = scored(corpus, corpus[::-1], corpus, "contrast")
    assert found.score.tolist() == [0.0] * 4
    assert found.top_latents.to_pylist() == [[]] * 4


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


def test_balanced_by_hand():
    """Two equal seeds count little more than the one beside them: (1.1 + 1) a = 1 for each of the two, 1.1 b = 1."""
    seeds = np.array([[1.0, 0, 0, 0, 0, 0], [5.0, 0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0, 0]])
    documents = np.array([[1.0, 0, 0, 0, 0, 0], [0, 4.0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0, 0], [0, 1.0, 1.0, 0, 0, 0]])
    found = scored(documents, seeds, documents, "none", "balanced")
    pair, single = 2 / 2.1, 1 / 1.1
    norm = (pair**2 + single**2) ** 0.5
    assert found.score.tolist() == pytest.approx([pair / norm, single / norm, 0.0, single / norm / 2**0.5])
    assert found.seed.tolist() == [0, 2, 0, 2]
    assert found.top_latents.to_pylist() == [[0], [1], [], [1]]


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


def test_decoded_by_hand():
    """Latents 0 and 1 are one direction that was split: to a seed of the one, a document of the other is all alike."""
    decoder = np.array([[1.0, 0], [1.0, 0], [0, 1.0], [0, 0], [0, 0], [0, 0]], np.float32)
    documents = codes_from(np.array([[3.0, 0, 0, 0, 0, 0], [0, 5.0, 0, 0, 0, 0], [0, 0, 4.0, 0, 0, 0], [0] * 6]))
    seeds = codes_from(np.array([[2.0, 0, 0, 0, 0, 0]]))
    # The mean code is (3, 5, 4) / 4, decoded (2, 1).
    found = Scorer(seeds, CorpusStatistics.of(documents), "max", "decoded", 1.0, None, decoder)(documents)
    direction = np.array([0.0, -1.0])
    expected = [np.array(x) @ direction / np.linalg.norm(x) for x in ([1.0, -1.0], [3.0, -1.0], [-2.0, 3.0])]
    assert found.score.tolist() == pytest.approx([*expected, -1.0])
    one = Scorer(seeds, CorpusStatistics.of(seeds.with_values(np.array([0.0]))), "max", "decoded", 1.0, None, decoder)(documents)
    assert one.score.tolist() == pytest.approx([1.0, 1.0, 0.0, -1.0])
    assert one.top_latents.to_pylist() == [[0], [], [], []]  # latent 1 speaks for it too, but the seed does not have it


def test_contrast_by_hand():
    """One seed at e, one background document at -e: by symmetry w = a e and no bias, where 2 / (1 + exp(a)) = 2 * 0.03 * a."""
    direction = np.array([0.6, -0.8, 0.0])
    weights = fit_contrast(direction[None], -direction[None])
    a = float(weights @ direction)
    np.testing.assert_allclose(weights, a * direction, atol=1e-12)
    assert 1 / (1 + np.exp(a)) == pytest.approx(0.03 * a, abs=1e-9)


def test_contrast_is_the_least_of_its_loss():
    """The gradient of the loss in its docstring is zero there, for the bias that is best for these weights."""
    random = np.random.default_rng(0)
    seeds, background = units(random.normal(0.3, 1, (4, 12))), units(random.normal(0, 1, (300, 12)))
    weights = fit_contrast(seeds, background)

    def slopes(bias: float) -> tuple[np.ndarray, float]:
        of_seeds = -1 / (1 + np.exp(seeds @ weights + bias)) / len(seeds)
        of_background = 1 / (1 + np.exp(-(background @ weights + bias))) / len(background)
        return of_seeds @ seeds + of_background @ background + 0.06 * weights, float(of_seeds.sum() + of_background.sum())

    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slopes(middle)[1] < 0 else (low, middle)
    assert np.abs(slopes(low)[0]).max() < 1e-8
    assert np.linalg.norm(weights) > 0.5


def test_softmax_lies_between_mean_and_max():
    random = np.random.default_rng(1)
    corpus, seeds = random.integers(0, 4, (30, NUM_LATENTS)).astype(float), random.integers(1, 4, (5, NUM_LATENTS)).astype(float)
    codes = codes_from(corpus)

    def at(temperature: float) -> np.ndarray:
        return Scorer(codes_from(seeds), CorpusStatistics.of(codes), "softmax", "centred", temperature, None, None)(codes).score

    mean, most = (scored(corpus, seeds, corpus, "centred", kind).score for kind in ("mean", "max"))
    assert np.all((at(0.1) >= mean - 1e-6) & (at(0.1) <= most + 1e-6))
    np.testing.assert_allclose(at(1e-4), most, atol=1e-3)
    np.testing.assert_allclose(at(1e4), mean, atol=1e-3)


def test_a_shard_of_any_size_is_scored_in_parts(monkeypatch: pytest.MonkeyPatch):
    corpus = np.random.default_rng(2).integers(0, 3, (23, NUM_LATENTS)).astype(float)
    whole = scored(corpus, corpus[:3], corpus, "centred")
    monkeypatch.setattr("finescope.curation.score._ROWS_TIMES_SEEDS", 15)
    parts = scored(corpus, corpus[:3], corpus, "centred")
    assert parts.score.tolist() == whole.score.tolist()
    assert parts.seed.tolist() == whole.seed.tolist()
    assert parts.top_latents.equals(whole.top_latents)


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
