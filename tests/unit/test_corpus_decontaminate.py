import pickle

from hypothesis import given
from hypothesis import strategies as st

from finescope.corpus.decontaminate import NgramIndex, normalised_hash, words

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def test_normalised_hash_forgets_case_and_white_space_only() -> None:
    assert normalised_hash("Straße \n x") == normalised_hash(" STRASSE x ")
    assert normalised_hash("a b") != normalised_hash("ab")
    assert normalised_hash("a, b") != normalised_hash("a b")
    assert len(normalised_hash("")) == 32


def test_a_shared_ngram_is_found_whatever_its_dress() -> None:
    index = NgramIndex.build(["Nothing here.", QUESTION])
    document = "Q:\n" + QUESTION.upper().replace(" ", "  ").replace(",", " --") + " A: 72"
    hit = index.hit(document)
    assert hit == "item 1: natalia sold clips to 48 of her friends in april and then she"
    assert pickle.loads(pickle.dumps(index)).hit(document) == hit
    twelve = " ".join(words(QUESTION)[:12])
    assert index.hit(twelve) is None
    assert index.hit(f"{twelve} sunshine " + " ".join(words(QUESTION)[13:])) is None


def test_short_items_hit_documents_that_are_nothing_else() -> None:
    index = NgramIndex.build(["What is two plus two?", "!!!"])
    assert index.hit("what is TWO plus two") == "item 0: what is two plus two"
    assert index.hit("what is two plus two plus two") is None
    assert index.hit("") is None
    assert NgramIndex.build([]).hit(QUESTION) is None


_TEXT = st.lists(st.sampled_from("abc"), max_size=30).map(" ".join)


@given(st.lists(_TEXT, max_size=4), _TEXT, st.integers(1, 5))
def test_index_finds_what_a_search_finds(items: list[str], document: str, n: int) -> None:
    def grams(text: str) -> list[tuple[str, ...]]:
        return [tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)]

    known = {gram for item in items for gram in grams(item)}
    known_short = {tuple(item.split()) for item in items if 0 < len(item.split()) < n}
    expected = any(gram in known for gram in grams(document)) or tuple(document.split()) in known_short
    assert (NgramIndex.build(items, n).hit(document) is not None) == expected
