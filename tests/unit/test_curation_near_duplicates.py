import numpy as np
import pytest

from finescope.curation.near_duplicates import NearDuplicates, jaccard, normalised_hash, rows_a_band, shingles, sketches


def test_normalised_hash_forgets_case_and_white_space_only() -> None:
    assert normalised_hash("Straße \n x") == normalised_hash(" STRASSE x ")
    assert normalised_hash("a b") != normalised_hash("ab")
    assert normalised_hash("a, b") != normalised_hash("a b")
    assert len(normalised_hash("")) == 16


def test_shingles_by_hand() -> None:
    assert shingles("The cat, the CAT; the cat", 2) == {"the cat", "cat ,", ", the", "cat ;", "; the"}
    assert shingles("One two", 5) == {"one two"}
    assert shingles(" \n", 2) == frozenset()
    assert shingles("किताब की", 2) == {"किताब की"}
    assert shingles("caf\u00e9", 1) == shingles("cafe\u0301", 1)
    assert jaccard(shingles("a b c d", 2), shingles("b c d e", 2)) == 2 / 4
    assert jaccard(frozenset(), frozenset()) == 0.0


def test_bands_find_what_lies_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        rows = rows_a_band(threshold)
        assert 1 - (1 - threshold**rows) ** (256 // rows) >= 0.99
    assert rows_a_band(0.8) == 8
    assert rows_a_band(1.0) == 256


def variants(count: int, seed: int) -> list[str]:
    """Texts of 60 words of which some are others with a few words changed."""
    random = np.random.default_rng(seed)
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and random.random() < 0.7:
            words = list(texts[random.integers(len(texts))])
            for at in random.integers(0, 60, random.integers(0, 8)):
                words[at] = f"w{random.integers(5000)}"
        else:
            words = [f"w{number}" for number in random.integers(0, 5000, 60)]
        texts.append(words)
    return [" ".join(words) for words in texts]


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_what_is_found_is_what_brute_force_finds(threshold: float) -> None:
    """The decisions, one after the other, against the exact Jaccard similarity to everything that is kept."""
    texts = variants(400, 0)
    sets = [shingles(text, 3) for text in texts]
    near, kept = NearDuplicates(threshold, 3, texts.__getitem__), []
    right = removed = 0
    for number, sketch in enumerate(sketches(texts, 3)):
        best = max(((jaccard(sets[number], sets[other]), -other) for other in kept), default=(0.0, 0))
        found = near.most_similar(number, sketch)
        if best[0] >= threshold:
            removed += 1
            right += found == (-best[1], best[0])
        else:
            assert found is None, "the texts decide: nothing below the threshold is removed"
        if found is None:
            kept.append(number)
            near.keep(number, sketch)
    assert removed > 80
    assert right >= 0.99 * removed


def test_sketches_are_the_same_alone_and_together() -> None:
    texts = variants(30, 1)
    assert sketches(texts, 5) == [sketches([text], 5)[0] for text in texts]


def test_texts_without_words_resemble_nothing() -> None:
    texts = ["?!", "...", "a b c"]
    near = NearDuplicates(0.8, 2, texts.__getitem__)
    for number, sketch in enumerate(sketches(texts, 2)):
        assert near.most_similar(number, sketch) is None
        near.keep(number, sketch)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Factor x^2 + 3x - 10 over the integers", "Factor x^2 - 3x + 10 over the integers"),
        ("if a < b and c >= d: return a[i] + b[j] * 2", "if a > b and c <= d: return a[i] - b[j] / 2"),
    ],
)
def test_signs_and_operators_tell_texts_apart(one: str, other: str) -> None:
    assert jaccard(shingles(one, 5), shingles(other, 5)) < 0.5
