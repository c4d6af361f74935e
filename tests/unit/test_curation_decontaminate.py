import pickle

from hypothesis import given
from hypothesis import strategies as st

from finescope.curation.decontaminate import NgramIndex, words

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def index_of(texts: list[str], n: int = 13) -> NgramIndex:
    return NgramIndex.build([(f"set, row {row}", text) for row, text in enumerate(texts)], n)


def test_a_shared_ngram_is_found_whatever_its_dress() -> None:
    index = index_of(["Nothing here.", QUESTION])
    document = "Q:\n" + QUESTION.upper().replace(" ", "  ").replace(",", " --") + " A: 72"
    hit = index.hit(document)
    assert hit == "set, row 1: natalia sold clips to 48 of her friends in april and then she"
    assert pickle.loads(pickle.dumps(index)).hit(document) == hit
    twelve = " ".join(words(QUESTION)[:12])
    assert index.hit(twelve) is None
    assert index.hit(f"{twelve} sunshine " + " ".join(words(QUESTION)[13:])) is None


def test_short_items_hit_documents_that_are_nothing_else() -> None:
    index = index_of(["What is two plus two?", "!!!"])
    assert index.hit("what is TWO plus two") == "set, row 0: what is two plus two"
    assert index.hit("what is two plus two plus two") is None
    assert index.hit("") is None
    assert index_of([]).hit(QUESTION) is None


_TEXT = st.lists(st.sampled_from("abc"), max_size=30).map(" ".join)


@given(st.lists(_TEXT, max_size=4), _TEXT, st.integers(1, 5))
def test_index_finds_what_a_search_finds(items: list[str], document: str, n: int) -> None:
    def grams(text: str) -> list[tuple[str, ...]]:
        return [tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)]

    known = {gram for item in items for gram in grams(item)}
    known_short = {tuple(item.split()) for item in items if 0 < len(item.split()) < n}
    expected = any(gram in known for gram in grams(document)) or tuple(document.split()) in known_short
    assert (index_of(items, n).hit(document) is not None) == expected


def test_words_of_every_script_are_whole() -> None:
    assert words("किताब की दुकान") == ["किताब", "की", "दुकान"]
    assert words("CAFE\u0301 au lait") == words("caf\u00e9 au lait") == ["caf\u00e9", "au", "lait"]
