"""Hashed n-grams against counts by hand."""

import hashlib
import math

import numpy as np
import pytest

from finescope.curation.codes import Codes
from finescope.curation.ngrams import BUCKETS, hashed_ngrams


def entries(rows: Codes, index: int) -> dict[int, float]:
    ids, values = rows.row(index)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def one(text: str, characters: int = 1000) -> dict[int, float]:
    return entries(hashed_ngrams([text], characters), 0)


def test_words_and_pairs_are_counted():
    found = sorted(one("a b a").values())
    # a twice; b, (a, b) and (b, a) once: 1 + log 2 and three times 1, at unit length.
    norm = math.sqrt((1 + math.log(2)) ** 2 + 3)
    assert found == pytest.approx([1 / norm] * 3 + [(1 + math.log(2)) / norm], rel=1e-6)


def test_a_bucket_is_the_same_in_every_process_and_version():
    word = int.from_bytes(hashlib.blake2b(b"integral", digest_size=8).digest(), "big")
    bucket = (word * 0x9E3779B97F4A7C15 % 2**64) >> 46
    assert one("Integral") == {bucket: 1.0}
    assert bucket < BUCKETS


def test_texts_do_not_touch_each_other():
    texts = ["the proof of a theorem", "", "salt and butter", "?", "the proof of a theorem"]
    together = hashed_ngrams(texts, 1000)
    assert [entries(together, at) for at in range(len(texts))] == [one(text) for text in texts]
    assert one("") == {}
    assert set(one("x")) | set(one("y")) < set(one("x y"))
    assert len(one("x y")) == 3, "and the pair"


def test_case_and_spaces_say_nothing_and_signs_do():
    assert one("Solve  X\n") == one("solve x")
    assert one("a + b") != one("a - b")
    assert one("a+b") == one("a + b")


def test_all_numbers_are_one():
    assert one("add 17 and 4") == one("add 3 and 100")
    assert one("x1 y22") == one("x7 y8") != one("x y")


def test_of_a_script_without_spaces_each_character_is_a_word():
    assert set(one("日")) < set(one("本日"))
    assert len(one("日本")) == 3
    assert len(one("слово")) == 1


def test_of_a_long_text_the_start_is_read():
    assert one("ab cd ef", characters=5) == one("ab cd")


def test_rows_are_at_unit_length():
    rows = hashed_ngrams(["one two two three", "", "f(x) = f(x) + 1"], 1000)
    np.testing.assert_allclose(rows.sum_rows(rows.values.astype(float) ** 2), [1, 0, 1], rtol=1e-6)
    assert len(hashed_ngrams([], 10)) == 0
