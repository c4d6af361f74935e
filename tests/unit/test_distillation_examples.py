import numpy as np
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


def test_every_epoch_is_another_permutation_and_the_same_again() -> None:
    made = random_examples(10)
    plan = ex.plan_steps(made, 4, 2, 7, None)
    assert [len(step.indices) for step in plan] == [4, 4, 2, 4, 4, 2]
    first, second = (np.concatenate([s.indices for s in plan[i : i + 3]]) for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    again = ex.plan_steps(made, 4, 2, 7, None)
    assert [s.indices.tolist() for s in plan] == [s.indices.tolist() for s in again]


@pytest.mark.parametrize("cap", [3, 50, 130, 1000])
def test_cap_ends_after_exactly_so_many_tokens(cap: int) -> None:
    made = tuple(ex.Example(example.tokens, 1) for example in random_examples(10))
    plan = ex.plan_steps(made, 4, 1, 7, cap)
    assert cap - 1 <= sum(step.tokens for step in plan) <= cap
    assert all((step.lengths > 1).all() for step in plan)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("budget", [10, 64, 10_000])
def test_ranks_share_a_batch_once_each_in_equally_many_passes(world_size: int, budget: int) -> None:
    made = random_examples(9)
    (step,) = ex.plan_steps(made, 9, 1, 0, None)
    shares = [ex.micro_batches(step, rank, world_size, budget) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    dealt = np.concatenate([positions for share in shares for positions in share])
    assert sorted(dealt) == list(range(9))
    for positions in (p for share in shares for p in share if len(p) > 1):
        assert len(positions) * step.lengths[positions].max() <= budget


def test_collate_pads_on_the_right_and_shifts_targets() -> None:
    made = (ex.Example(np.array([5, 6, 7, 8], np.int32), 2), ex.Example(np.array([9, 10], np.int32), 1))
    step = ex.Step(np.array([0, 1]), np.array([4, 2]))
    tokens, targets = ex.collate(made, step, np.array([0, 1]))
    assert tokens.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert targets.tolist() == [[-100, 7, 8, -100], [10, -100, -100, -100]]
    assert ex.loss_tokens(made, step) == 3
    tokens, targets = ex.collate(made, step, np.empty(0, np.int64))
    assert (tokens.tolist(), targets.tolist()) == ([[0]], [[-100]])
