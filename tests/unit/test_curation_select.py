import numpy as np
import pytest

from finescope.config import CurateSection
from finescope.curation.codes import Codes
from finescope.curation.diversity import MarginalRelevance
from finescope.curation.near_duplicates import NearDuplicates, normalised_hash, sketches
from finescope.curation.select import Candidate, Limits, Selection, diverse

NO_LIMIT = Limits(None, None, None)


def offered(documents: list[tuple[int, str]], limits: Limits = NO_LIMIT, item: str = "LEAKED") -> Selection:
    """Documents of (seed, text), ten tokens each; one whose text is `item` is contaminated."""
    selection = Selection(limits, None)
    for position, (seed, text) in enumerate(documents):
        if selection.full:
            break
        hit = "set, row 3: words" if text == item else None
        selection.offer(Candidate(position, f"d{position}", seed, 10, normalised_hash(text), None, hit))
    return selection


def test_what_passes_is_kept():
    selection = offered([(0, "a"), (0, "b")], Limits(2, None, None))
    assert (selection.kept, selection.rejected, selection.full) == ([0, 1], [], True)
    assert not offered([(0, "a")], Limits(2, None, None)).full


def test_a_duplicate_names_the_better_one():
    selection = offered([(0, "One  text"), (1, "another"), (2, "one text\n"), (0, "ONE TEXT")])
    assert selection.kept == [0, 1]
    assert selection.rejected == [(2, "duplicate", "of d0"), (3, "duplicate", "of d0")]


def test_an_empty_id_is_an_id():
    selection = Selection(NO_LIMIT, None)
    selection.offer(Candidate(0, "", 0, 1, b"x"))
    selection.offer(Candidate(1, "b", 0, 1, b"x"))
    assert selection.rejected == [(1, "duplicate", "of ")]


def test_a_seed_has_its_quota_of_what_is_kept():
    documents = [(0, "LEAKED"), (0, "a"), (0, "b"), (0, "c"), (1, "d"), (0, "e")]
    selection = offered(documents, Limits(None, None, 2))
    assert selection.kept == [1, 2, 4]
    assert selection.rejected[0] == (0, "contaminated", "set, row 3: words")
    assert [(position, reason) for position, reason, _ in selection.rejected[1:]] == [(3, "per_seed"), (5, "per_seed")]
    assert selection.rejected[1][2] == "seed 0 has 2 better ones"


def test_the_first_reason_counts():
    selection = offered([(0, "a"), (0, "A"), (0, "LEAKED"), (0, "b"), (1, "b")], Limits(None, None, 1))
    assert [reason for _, reason, _ in selection.rejected] == ["duplicate", "contaminated", "per_seed"]
    assert selection.kept == [0, 4], "a document that was rejected makes no other a duplicate"


@pytest.mark.parametrize(("tokens", "kept"), [(9, 0), (10, 1), (29, 2), (30, 3), (99, 4)])
def test_a_budget_of_tokens_is_never_exceeded(tokens: int, kept: int):
    selection = offered([(0, "a"), (0, "b"), (0, "B"), (0, "c"), (0, "d")], Limits(None, tokens, None))
    assert (len(selection.kept), selection.tokens) == (kept, 10 * kept)
    assert selection.full == (kept < 4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (1000, None, None)),
        ({"share": 0.1}, (20, None, None)),
        ({"share": 0.0001}, (1, None, None)),
        ({"documents": 7, "share": 0.1, "tokens": 5}, (7, 5, None)),
        ({"documents": 70, "share": 0.1, "threshold": 0.5}, (20, None, None)),
        ({"tokens": 5}, (None, 5, None)),
        ({"per_seed": 4}, (12, None, 4)),
    ],
)
def test_the_strictest_limit_wins(values: dict[str, float], expected: tuple[int | None, ...]):
    assert Limits.of(CurateSection.model_validate(values), 200, 3) == expected


def test_a_near_duplicate_names_the_most_similar_one():
    """Shingles of one word: the last text shares 7 of 9 words with the first, 8 of 9 with the second."""
    texts = ["a b c d e f g x", "a b c d e f g h", "u v w", "a b c d e f g h i"]
    near = NearDuplicates(0.77, 1, texts.__getitem__)
    selection = Selection(NO_LIMIT, near)
    for position, sketch in enumerate(sketches(texts, 1)):
        selection.offer(Candidate(position, f"d{position}", 0, 1, None, sketch))
    # The first two: 7 of 9, 0.778, so the second is one of the first; the last is then held against the first alone.
    assert selection.kept == [0, 2, 3]
    assert selection.rejected == [(1, "near_duplicate", "of d0, similarity 0.778")]


def test_a_diverse_selection_gives_every_document_a_fate():
    """Two pairs of like codes and one of its own; of each pair the better one, then the quota of a seed, then the rest."""
    codes = Codes(np.arange(6), np.array([0, 0, 1, 1, 2], np.int32), np.ones(5, np.float32), 3)
    pool = [
        Candidate(position, f"d{position}", seed, 10) for position, seed in zip((3, 5, 6, 8, 9), (0, 0, 0, 1, 0), strict=True)
    ]
    order = MarginalRelevance(np.array([0.9, 0.8, 0.7, 0.6, 0.5]), codes, 0.5)
    selection = diverse(pool, order, Limits(3, None, 2))
    assert selection.kept == [3, 6, 8]
    assert selection.rejected == [
        (9, "per_seed", "seed 0 has 2 better ones"),
        (5, "per_seed", "seed 0 has 2 better ones"),
    ]
    selection = diverse(pool, MarginalRelevance(np.array([0.9, 0.8, 0.7, 0.6, 0.5]), codes, 0.5), Limits(2, None, None))
    assert selection.kept == [3, 6]
    assert selection.rejected == [
        (5, "diversity", "similarity 1.000 to d3"),
        (8, "diversity", "similarity 1.000 to d6"),
        (9, "diversity", "of a lower score"),
    ]
