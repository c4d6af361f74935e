import numpy as np
import pytest
import torch
from distillation_fixtures import random_examples
from tiny_models import FAMILIES, tiny_model

from finescope.distillation import batches as bt
from finescope.distillation.examples import Example
from finescope.models.anatomy import anatomy_of


def test_every_epoch_is_another_permutation_and_the_same_again() -> None:
    made = random_examples(10)
    plan = bt.plan_steps(made, np.arange(len(made)), 4, 2, 7, None)
    assert [len(step.indices) for step in plan] == [4, 4, 2, 4, 4, 2]
    first, second = (np.concatenate([s.indices for s in plan[i : i + 3]]) for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    again = bt.plan_steps(made, np.arange(len(made)), 4, 2, 7, None)
    assert [s.indices.tolist() for s in plan] == [s.indices.tolist() for s in again]


@pytest.mark.parametrize("cap", [3, 50, 130, 1000])
def test_cap_ends_after_exactly_so_many_tokens(cap: int) -> None:
    made = tuple(Example(example.tokens, 1) for example in random_examples(10))
    plan = bt.plan_steps(made, np.arange(len(made)), 4, 1, 7, cap)
    assert cap - 1 <= sum(step.tokens for step in plan) <= cap
    assert all((step.lengths > 1).all() for step in plan)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("budget", [10, 64, 10_000])
def test_ranks_share_a_batch_once_each_in_equally_many_passes(world_size: int, budget: int, packing: bool) -> None:
    made = random_examples(9)
    (step,) = bt.plan_steps(made, np.arange(9), 9, 1, 0, None)
    shares = [bt.passes_of(step, rank, world_size, budget, packing) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    dealt = [place for share in shares for rows in share for row in rows for place in row]
    assert sorted(dealt) == list(range(9))
    for rows in (rows for share in shares for rows in share if len(rows) > 1):
        assert len(rows) * max(int(step.lengths[row].sum()) for row in rows) <= budget


def test_rows_are_filled_evenly() -> None:
    # Twice the longest is 16: 40 tokens take three rows; 8+4+2, 7+5+2 and 6+6 are 14, 14 and 12.
    step = bt.Step(np.arange(8), np.array([8, 7, 6, 6, 5, 4, 2, 2]))
    ((rows,),) = (bt.passes_of(step, 0, 1, 1000, True),)
    assert [[step.lengths[place] for place in row] for row in rows] == [[8, 4, 2], [7, 5, 2], [6, 6]]


def test_packed_rows_leave_little_empty() -> None:
    lengths = np.random.default_rng(0).integers(50, 257, 128)
    step = bt.Step(np.arange(128), lengths)
    passes = bt.passes_of(step, 0, 1, 4096, True)
    padded = sum(len(rows) * max(lengths[row].sum() for row in rows) for rows in passes)
    assert step.tokens / padded > 0.97


def test_collate_shifts_targets_and_begins_positions_anew() -> None:
    made = tuple(Example(np.array(ids, np.int32), start) for ids, start in (([5, 6, 7, 8], 2), ([9, 10], 1), ([11, 12, 13], 1)))
    step = bt.Step(np.array([0, 1, 2]), np.array([4, 2, 3]))
    batch = bt.collate(made, step, [[0, 1], [2]])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]]
    assert batch.targets.tolist() == [[-100, 7, 8, -100, 10, -100], [12, 13, -100, -100, -100, -100]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert bt.loss_tokens(made, step) == 5
    assert bt.collate(made, step, [[0], [2]]).positions is None
    empty = bt.collate(made, step, [])
    assert (empty.tokens.tolist(), empty.targets.tolist()) == ([[0]], [[-100]])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_example_of_a_row_sees_another(family: str) -> None:
    model = tiny_model(family)
    generator = np.random.default_rng(0)
    made = tuple(Example(generator.integers(3, 64, length).astype(np.int32), 1) for length in (9, 7, 5, 4))
    step = bt.whole(made, np.arange(4))
    batch = bt.collate(made, step, [[0, 2], [1, 3]])
    assert batch.positions is not None
    base = model.get_submodule(anatomy_of(model).decoder)
    with torch.no_grad():
        packed = base(
            input_ids=torch.from_numpy(batch.tokens), position_ids=torch.from_numpy(batch.positions), use_cache=False
        ).last_hidden_state
        for row, begin, index in ((0, 0, 0), (0, 9, 2), (1, 0, 1), (1, 7, 3)):
            alone = base(input_ids=torch.from_numpy(made[index].tokens.astype(np.int64))[None], use_cache=False).last_hidden_state
            found = packed[row, begin : begin + len(made[index].tokens)]
            torch.testing.assert_close(found, alone[0], atol=1e-4, rtol=1e-4)
        # The second example of a row is another one where it is not told apart from the first.
        blind = base(input_ids=torch.from_numpy(batch.tokens), use_cache=False).last_hidden_state
    assert not torch.allclose(blind[0, 9:14], packed[0, 9:14], atol=1e-2)


@pytest.mark.parametrize(("count", "asked", "held"), [(100, 5, 5), (40, 32, 4), (9, 32, 0), (50, 0, 0)])
def test_held_out_examples_are_a_tenth_at_most(count: int, asked: int, held: int) -> None:
    trained, held_out = bt.split_held_out(count, asked, 3)
    assert len(held_out) == held
    assert sorted([*trained, *held_out]) == list(range(count))
    assert bt.split_held_out(count, asked, 3)[1].tolist() == held_out.tolist()
