import numpy as np
import pytest
from corpus_files import word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from finescope.corpus.tokenise import length_batches, pad_batch, tokenise


def test_tokenise_cuts_at_the_end() -> None:
    tokenizer = word_tokenizer("a b c")
    tokens = tokenise(tokenizer, ["a b c a", "b", ""], 3)
    assert [ids.tolist() for ids in tokens] == [[1, 2, 3], [2], []]
    assert all(ids.dtype == np.int32 for ids in tokens)
    assert tokenise(tokenizer, [], 3) == []


def test_a_text_with_its_own_beginning_gets_no_second_one() -> None:
    tokenizer = word_tokenizer("a b", bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert [ids.tolist() for ids in tokenise(tokenizer, ["a b", "<s> a b", ""], 8)] == [[1, 2, 3], [1, 2, 3], [1]]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 120))
def test_batches_hold_every_document_once_within_the_budget(lengths: list[int], batch_tokens: int) -> None:
    batches = length_batches(lengths, batch_tokens)
    order = [int(i) for batch in batches for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-max(lengths[i], 1), i))
    for batch in batches:
        longest = max([1, *(lengths[i] for i in batch)])
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
    for batch in batches[:-1]:
        assert (len(batch) + 1) * max(1, lengths[batch[0]]) > batch_tokens, "one more would have fitted"


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=9))
def test_padding_is_on_the_right_and_comes_off_again(lists: list[list[int]]) -> None:
    ids, mask = pad_batch([np.array(tokens, dtype=np.int32) for tokens in lists], -7)
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (len(lists), max((len(tokens) for tokens in lists), default=0))
    assert [row[keep == 1].tolist() for row, keep in zip(ids, mask, strict=True)] == lists
    assert (ids[mask == 0] == -7).all()
    assert (np.diff(mask, axis=1) <= 0).all()


@pytest.mark.parametrize("lengths", [[], [0], [5000]])
def test_batches_at_the_edges(lengths: list[int]) -> None:
    assert [batch.tolist() for batch in length_batches(lengths, 8)] == [[i] for i in range(len(lengths))]
