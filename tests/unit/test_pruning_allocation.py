import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finescope.errors import RecipeError
from finescope.pruning.allocation import choose, removed_ratio
from finescope.pruning.groups import Groups
from finescope.pruning.importance import Importance

# A block of 4 heads of 100 parameters, 60 channels of 10 and nothing else: heads are 40 % of it.
GROUPS = Groups(2, 8, 2, 4, 1, 60, 100, 10, 1000, 3000)


def importance(head: float, channel: float, groups: Groups = GROUPS) -> Importance:
    heads = [head * np.arange(1, groups.num_kv_heads + 1, dtype=np.float32)] * groups.num_layers
    return Importance(heads, [np.full(groups.num_channels, channel, np.float32)] * groups.num_layers)


def sizes(kept):
    assert len({len(x) for x in kept.heads}) == len({len(x) for x in kept.mlp}) == 1
    return len(kept.heads[0]), len(kept.mlp[0])


def test_split_follows_the_smaller_loss():
    # 25 %: no head and 25 channels, or one head and 15 channels (10 % of ratio * heads more is not allowed).
    assert sizes(choose(importance(1000, 1), GROUPS, 0.25, "auto", 1)) == (4, 35)
    assert sizes(choose(importance(5, 1), GROUPS, 0.25, "auto", 1)) == (3, 45)
    assert sizes(choose(importance(5, 1), GROUPS, 0.25, ("heads", "mlp"), 1)) == (3, 45)
    # 50 %: heads cost 1 + 2 at most, a channel 10: as many heads as allowed, two.
    assert sizes(choose(importance(1, 10), GROUPS, 0.5, "auto", 1)) == (2, 30)


def test_the_least_important_leave():
    heads = [np.array([3.0, 1.0, 2.0, 4.0], np.float32), np.array([1.0, 2.0, 3.0, 0.5], np.float32)]
    mlp = [np.arange(60, dtype=np.float32), np.arange(60, dtype=np.float32)[::-1].copy()]
    kept = choose(Importance(heads, mlp), GROUPS, 0.2, ("heads",), 1)
    assert [list(x) for x in kept.heads] == [[0, 3], [1, 2]]
    kept = choose(Importance(heads, mlp), GROUPS, 0.2, ("mlp",), 1)
    assert [list(x) for x in kept.mlp] == [list(range(20, 60)), list(range(40))]
    assert sizes(kept) == (4, 40)


def test_rounding_is_to_the_nearest_multiple_and_ties_keep_the_first():
    kept = choose(importance(1, 1), GROUPS, 0.2, ("mlp",), 16)  # 40 channels would stay: 2.5 units
    assert list(kept.mlp[0]) == list(range(48))
    assert sizes(choose(importance(1, 1), GROUPS, 0.23, ("mlp",), 16)) == (4, 32)
    assert sizes(choose(importance(1, 1), GROUPS, 0.23, ("mlp",), 64)) == (4, 37)  # the MLP is smaller than one unit


def test_ratio_zero_keeps_everything():
    kept = choose(importance(1, 1), GROUPS, 0.0, "auto", 32)
    assert sizes(kept) == (4, 60)
    assert list(kept.mlp[1]) == list(range(60))


def test_unreachable_says_the_largest():
    with pytest.raises(RecipeError, match=r"largest reachable ratio is 0\.59"):
        choose(importance(1, 1), GROUPS, 0.7, ("mlp",), 1)
    with pytest.raises(RecipeError, match=r"largest reachable ratio is 0\.3"):
        choose(importance(1, 1), GROUPS, 0.4, ("heads",), 1)
    with pytest.raises(RecipeError, match=r"largest reachable ratio is 0\.89"):
        choose(importance(1, 1), GROUPS, 0.95, "auto", 1)
    assert sizes(choose(importance(1, 1), GROUPS, 0.89, "auto", 1)) == (1, 1)


def test_heads_beyond_their_share_where_channels_are_not_enough():
    # Two heads of 400 parameters and 20 channels: 45 % is less than one head of two, and more than all channels.
    small_mlp = GROUPS._replace(num_channels=20, num_kv_heads=2, head_params=400)
    assert sizes(choose(importance(1, 1, small_mlp), small_mlp, 0.45, "auto", 1)) == (1, 15)


def test_a_ratio_that_removes_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"removes nothing .* at least 0\.05"):
        choose(importance(1, 1), GROUPS, 0.02, ("heads",), 1)
    with pytest.raises(RecipeError, match="removes nothing"):
        choose(importance(1, 1), GROUPS, 0.01, "auto", 32)
    with pytest.raises(RecipeError, match="structure is empty"):
        choose(importance(1, 1), GROUPS, 0.2, (), 32)


@given(
    ratio=st.floats(0.01, 0.95),
    heads=st.integers(1, 9),
    channels=st.integers(1, 200),
    head_params=st.integers(10, 500),
    round_to=st.integers(1, 64),
    seed=st.integers(0, 5),
)
def test_sizes_are_legal_and_near_the_ratio(ratio, heads, channels, head_params, round_to, seed):
    groups = Groups(2, 8, 2, heads, 1, channels, head_params, 10, heads * head_params + channels * 10 + 16, 0)
    rng = np.random.default_rng(seed)
    drawn = Importance(list(rng.random((2, heads), np.float32)), list(rng.random((2, channels), np.float32)))
    try:
        kept_heads, kept_channels = sizes(choose(drawn, groups, ratio, "auto", round_to))
    except RecipeError:
        return
    unit = round_to if channels >= round_to else 1
    assert 1 <= kept_heads <= heads
    assert kept_channels == channels or (kept_channels % unit == 0 and kept_channels >= unit)
    reached = removed_ratio(groups, kept_heads, kept_channels)
    if heads - kept_heads <= ratio * heads + 1e-9:
        assert abs(reached - ratio) * groups.block_params <= unit * 10 / 2 + 1e-6
