"""The screen's linear model, its cut and the measure of its recall, against answers known by hand."""

import math

import numpy as np
import pytest

from finescope.config_screen import ScreenSection
from finescope.curation.codes import Codes
from finescope.curation.ngrams import hashed_ngrams
from finescope.curation.screen import FOLDS, Screen, cut_of, foretell, recall_of, ridge


def sparse(matrix: np.ndarray) -> Codes:
    rows, ids = np.nonzero(matrix)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return Codes(offsets, ids.astype(np.int32), matrix[rows, ids].astype(np.float32), matrix.shape[1])


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_ridge_solves_the_normal_equations(penalty: float):
    random = np.random.default_rng(0)
    matrix = (random.random((40, 12)) * (random.random((40, 12)) < 0.4)).astype(np.float32)
    targets, weight = random.normal(size=40), (random.random(40) < 0.7).astype(float)
    expected = np.linalg.solve(matrix.T @ (weight[:, None] * matrix) + penalty * np.eye(12), matrix.T @ (weight * targets))
    np.testing.assert_allclose(ridge(sparse(matrix), targets, weight, penalty), expected, rtol=1e-3, atol=1e-4)


def test_a_target_of_zero_takes_no_weights():
    assert not ridge(sparse(np.eye(3)), np.zeros(3), np.ones(3), 1.0).any()


def words(count: int) -> tuple[list[str], np.ndarray]:
    """Texts of one kind and another, and scores that are high of the first, a quarter."""
    random = np.random.default_rng(1)
    kinds = [["sum", "prime", "root", "proof"], ["salt", "onion", "oven", "soup"]]
    of_first = np.arange(count) % 4 == 0
    texts = [" ".join(random.choice(kinds[0 if first else 1] + ["the", "and"], 8)) for first in of_first]
    return texts, np.where(of_first, 0.8, 0.1) + 0.02 * random.normal(size=count)


def test_what_is_foretold_of_a_document_does_not_know_its_score():
    texts, scores = words(60)
    rows, none = hashed_ngrams(texts, 1000), hashed_ngrams([], 1000)
    plain = foretell(rows, scores, none, np.zeros(0), 3)
    assert np.corrcoef(plain.scores, scores)[0, 1] > 0.9
    changed = scores.copy()
    changed[7] += 5.0
    found = foretell(rows, changed, none, np.zeros(0), 3)
    same = np.flatnonzero(np.isclose(found.scores, plain.scores, rtol=0, atol=1e-9))
    assert 7 in same
    assert len(same) == len(texts) // FOLDS, "its fold, and no other document"


def test_seeds_are_examples_where_the_sample_has_none():
    texts, scores = words(60)
    others = [at for at in range(60) if at % 4]
    rows = hashed_ngrams([texts[at] for at in others], 1000)
    found = foretell(rows, scores[others], hashed_ngrams(["sum prime root proof"] * 3, 1000), np.full(3, 0.9), 0)
    of_first, of_other = (hashed_ngrams([text], 1000) for text in ("root of a prime", "oven soup"))
    said = [float(row.sum_rows(row.values * found.weights[row.ids])[0]) for row in (of_first, of_other)]
    assert said[0] > said[1]


def section(**values: float) -> ScreenSection:
    return ScreenSection.model_validate(values)


def test_the_cut_by_recall_is_a_rank_among_the_best():
    scores = np.linspace(1, 0, 100)
    foretold = np.concatenate([np.arange(20) + 100.0, np.arange(80)])
    # Of the best 20 with 100 ... 119 the rank floor(0.1 * 21) = 2 from below: 101; one of them is lost, and 81 others.
    cut = cut_of(foretold, scores, section(top=0.2, recall=0.9))
    assert cut == (101.0, 0.19, 0.95, 20)
    # floor(0.01 * 21) = 0: so few promise nothing, and all pass.
    assert cut_of(foretold, scores, section(top=0.2, recall=0.99)) == (-math.inf, 1.0, 1.0, 20)


def test_the_cut_by_share_is_a_rank_among_all():
    foretold = np.random.default_rng(0).permutation(100).astype(float)
    assert cut_of(foretold, foretold, section(share=0.3, top=0.1)) == (70.0, 0.3, 1.0, 10)
    assert cut_of(foretold, -foretold, section(share=0.3, top=0.1)).recall == 0.0
    assert cut_of(foretold, foretold, section(share=1.0)).value == -math.inf


def test_the_recall_holds_on_the_average_even_of_a_model_that_knows_nothing():
    random, asked, found = np.random.default_rng(0), section(top=0.2, recall=0.9), []
    for _ in range(300):
        sample, fresh = random.normal(size=(2, 250))
        found.append((fresh >= cut_of(sample, random.random(250), asked).value).mean())
    # 5 of 51 ranks lie at the cut or below: 0.902, with a standard error of 0.0024.
    assert np.mean(found) + 0.005 >= 0.9
    assert np.mean(found) < 0.92


def test_margins_are_those_of_the_domain_that_wants_it_most():
    texts = ["sum prime", "oven", "", "sum oven"]
    weights = np.zeros((2, hashed_ngrams([], 1).num_latents), np.float32)
    for domain, word in enumerate(("sum", "oven")):
        weights[domain, hashed_ngrams([word], 100).ids] = 1.0
    screen = Screen(weights, np.array([0.1, 0.2]), np.array([0.5, 0.6]), 1000)
    # Of two words and their pair each has 1 / sqrt 3, of one word it has 1.
    third = 1 / math.sqrt(3)
    np.testing.assert_allclose(screen.margins(texts), [third - 0.4, 0.6, -0.4, third - 0.4], rtol=1e-6)
    again, facts = Screen.from_bytes(screen.to_bytes({"domains": ["a"]}))
    assert facts == {"domains": ["a"]}
    assert again.margins(texts).tolist() == screen.margins(texts).tolist()
    everything = Screen(weights, np.zeros(2), np.array([9.0, -math.inf]), 1000)
    assert (everything.margins(texts) >= 0).all()
    assert screen.margins([]).shape == (0,)


def test_texts_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch):
    texts, _ = words(30)
    random = np.random.default_rng(0)
    weights = random.normal(size=(1, hashed_ngrams([], 1).num_latents)).astype(np.float32)
    screen = Screen(weights, np.zeros(1), np.zeros(1), 1000)
    whole = screen.margins(texts)
    monkeypatch.setattr("finescope.curation.screen._TEXTS", 7)
    assert screen.margins(texts).tolist() == whole.tolist()


def test_recall_is_that_of_an_audit():
    # Two of 100 stand for 20 of 1,000: 60 of 80 passed.
    found = recall_of(60, 2, 100, 1000)
    assert found.recall == pytest.approx(60 / 80)
    # Wilson of none in 100 is [0, z^2 / (100 + z^2)] = [0, 0.036995]; of the 900 that were not looked at.
    none = recall_of(60, 0, 100, 1000)
    assert none == pytest.approx((1.0, 60 / (60 + 900 * 0.036995), 1.0), rel=1e-4)
    assert found.at_least < found.recall < found.at_most < 1.0
    assert recall_of(60, 20, 1000, 1000) == (0.75, 0.75, 0.75), "where all are looked at nothing is unsure"
    assert recall_of(60, 0, 0, 0) == (1.0, 1.0, 1.0)
    assert recall_of(60, 0, 0, 20) == (1.0, 0.75, 1.0)


def test_a_sample_that_cannot_promise_the_recall_is_refused():
    with pytest.raises(ValueError, match="takes a sample of at least 10,000 documents"):
        section(recall=0.99, top=0.01)
    assert section(recall=0.99, top=0.01, sample=10_000).share is None
    assert section(recall=0.99, top=0.01, share=0.2).sample == 4096
