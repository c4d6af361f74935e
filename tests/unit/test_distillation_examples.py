import pytest
from distillation_fixtures import random_examples, tiny_tokenizer

from finescope.distillation import examples as ex
from finescope.errors import ModelError


def test_prompt_is_read_and_response_with_its_end_is_trained_on() -> None:
    tokenizer = tiny_tokenizer()
    built = ex.build_examples(tokenizer, [("2+2?", "4")], 64)
    (example,) = built.examples
    assert tokenizer.decode(example.tokens[: example.loss_start]) == "<s>user\n2+2?</s>\n<s>assistant\n"
    assert tokenizer.decode(example.tokens[example.loss_start :]) == "4</s>"


def test_without_a_template_the_prompt_stands_on_lines_of_its_own() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    (example,) = ex.build_examples(tokenizer, [("2+2?", "4")], 64).examples
    assert tokenizer.decode(example.tokens[: example.loss_start]) == "2+2?\n\n"
    assert tokenizer.decode(example.tokens[example.loss_start :]) == "4</s>"


def test_plain_text_truncation_and_drops_are_counted() -> None:
    built = ex.build_examples(tiny_tokenizer(), [(None, "abcdefgh"), (None, "a"), (None, ""), ("p" * 50, "r")], 6)
    (example,) = built.examples
    assert (len(example.tokens), example.loss_start) == (6, 1)
    assert built.truncated == 2
    assert [index for index, _ in built.dropped] == [1, 2, 3]
    assert built.dropped[2][1] == "the prompt alone fills max_tokens"


def test_template_that_changes_the_prompt_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="chat template"):
        ex.build_examples(tokenizer, [("p", "r")], 64)


def test_table_round_trip() -> None:
    made = random_examples(5)
    back = ex.from_table(ex.to_table(made))
    assert all((a.tokens == b.tokens).all() and a.loss_start == b.loss_start for a, b in zip(made, back, strict=True))
