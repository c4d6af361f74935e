import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finescope.errors import RecipeError
from finescope.models.groups import Groups, Heads, Layout
from finescope.pruning import allocation
from finescope.pruning.allocation import removed_ratio
from finescope.pruning.importance import Importance

choose = functools.partial(allocation.choose, required=True)


def layout(*groups: Groups, block_params: int = 1000) -> Layout:
    """Two blocks of these groups."""
    able = {found.kind for found in groups if len(found.allowed) > 1}
    refused = {kind: "there are none" for kind in ("heads", "mlp", "experts") if kind not in able}
    return Layout(groups, Heads(4, 4, 2), (), (), 2, 2 * block_params, 3000, refused)


def heads(count: int = 4, params: int = 100, allowed: tuple[int, ...] | None = None) -> Groups:
    return Groups("heads", (0, 1), False, 1, count, params, allowed or tuple(range(1, count + 1)), "")


def channels(count: int = 60, experts: int | None = None, layers: tuple[int, ...] = (0, 1)) -> Groups:
    return Groups("mlp", layers, experts is not None, experts or 1, count, 10, tuple(range(1, count + 1)), "channels")


def experts(count: int, params: int, least: int = 1, layers: tuple[int, ...] = (0, 1)) -> Groups:
    return Groups("experts", layers, False, 1, count, params, tuple(range(least, count + 1)), "experts")


# A block of 4 heads of 100 parameters, 60 channels of 10 and nothing else: heads are 40 % of it.
MODEL = layout(heads(), channels())
# A block of 2 heads of 100 parameters and 4 experts of 20 channels of 10 parameters: experts are 80 % of it.
MIXTURE = layout(heads(2), channels(20, 4), experts(4, 200, least=2))


def importance(model: Layout, **each: float) -> Importance:
    """Group i has i + 1 times the number given for its kind; channels have that number."""
    values = []
    for groups in model.groups:
        ranks = np.ones(groups.number) if groups.kind == "mlp" else np.arange(1, groups.number + 1)
        shape = (len(groups.layers), groups.rows, groups.number)
        values.append(np.broadcast_to(each.get(groups.kind, 1.0) * ranks, shape).astype(np.float32))
    return Importance(tuple(values), {})


def sizes(kept):
    return tuple(found.shape[-1] for found in kept)


def test_split_follows_the_smaller_loss():
    # 25 %: no head and 25 channels, or one head and 15 channels (10 % of ratio * heads more is not allowed).
    assert sizes(choose(importance(MODEL, heads=1000), MODEL, 0.25, "auto", 1)) == (4, 35)
    assert sizes(choose(importance(MODEL, heads=5), MODEL, 0.25, "auto", 1)) == (3, 45)
    assert sizes(choose(importance(MODEL, heads=5), MODEL, 0.25, ("heads", "mlp"), 1)) == (3, 45)
    # 50 %: heads cost 1 + 2 at most, a channel 10: as many heads as allowed, two.
    assert sizes(choose(importance(MODEL, mlp=10), MODEL, 0.5, "auto", 1)) == (2, 30)


def test_the_least_important_leave():
    head_values = np.array([[[3.0, 1.0, 2.0, 4.0]], [[1.0, 2.0, 3.0, 0.5]]], np.float32)
    mlp = np.stack([np.arange(60)[None], np.arange(60)[None, ::-1]]).astype(np.float32)
    given_values = Importance((head_values, mlp), {})
    kept, _ = choose(given_values, MODEL, 0.2, ("heads",), 1)
    assert kept.tolist() == [[[0, 3]], [[1, 2]]]
    whole, kept = choose(given_values, MODEL, 0.2, ("mlp",), 1)
    assert kept.tolist() == [[list(range(20, 60))], [list(range(40))]]
    assert whole.shape == (2, 1, 4)


def test_rounding_is_to_the_nearest_multiple_and_ties_keep_the_first():
    _, kept = choose(importance(MODEL), MODEL, 0.2, ("mlp",), 16)  # 40 channels would stay: 2.5 units
    assert kept[0, 0].tolist() == list(range(48))
    assert sizes(choose(importance(MODEL), MODEL, 0.23, ("mlp",), 16)) == (4, 32)
    assert sizes(choose(importance(MODEL), MODEL, 0.23, ("mlp",), 64)) == (4, 37)  # the MLP is smaller than one unit


def test_ratio_zero_keeps_everything():
    kept = choose(importance(MODEL), MODEL, 0.0, "auto", 32)
    assert sizes(kept) == (4, 60)
    assert kept[1][1, 0].tolist() == list(range(60))


def test_unreachable_says_the_largest():
    with pytest.raises(RecipeError, match=r"largest reachable ratio is 0\.59"):
        choose(importance(MODEL), MODEL, 0.7, ("mlp",), 1)
    with pytest.raises(RecipeError, match=r"largest reachable ratio is 0\.3"):
        choose(importance(MODEL), MODEL, 0.4, ("heads",), 1)
    with pytest.raises(RecipeError, match=r"largest reachable ratio is 0\.89"):
        choose(importance(MODEL), MODEL, 0.95, "auto", 1)
    assert sizes(choose(importance(MODEL), MODEL, 0.89, "auto", 1)) == (1, 1)


def test_heads_beyond_their_share_where_channels_are_not_enough():
    # Two heads of 400 parameters and 20 channels: 45 % is less than one head of two, and more than all channels.
    small_mlp = layout(heads(2, 400), channels(20))
    assert sizes(choose(importance(small_mlp), small_mlp, 0.45, "auto", 1)) == (1, 15)


def test_a_ratio_that_removes_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"removes nothing .* more than 0\.05"):
        choose(importance(MODEL), MODEL, 0.05, ("heads",), 1)
    assert sizes(choose(importance(MODEL), MODEL, 0.0501, ("heads",), 1)) == (3, 60)
    with pytest.raises(RecipeError, match="removes nothing"):
        choose(importance(MODEL), MODEL, 0.01, "auto", 32)
    with pytest.raises(RecipeError, match="structure is empty"):
        choose(importance(MODEL), MODEL, 0.2, (), 32)


def test_a_kind_that_the_model_cannot_lose_is_refused():
    with pytest.raises(RecipeError, match=r"no experts can be removed from this model: there are none; .* heads, mlp"):
        choose(importance(MODEL), MODEL, 0.2, ("mlp", "experts"), 1)


def test_only_numbers_of_heads_that_are_allowed_are_tried():
    # Of six heads one, two, three or all may stay.
    some = layout(heads(6, 100, (1, 2, 3, 6)), channels(40))
    assert sizes(choose(importance(some), some, 0.25, ("heads",), 1)) == (3, 40)  # 250 of 600: 3.5 would stay
    assert sizes(choose(importance(some, mlp=100), some, 0.5, "auto", 1)) == (3, 20)
    with pytest.raises(RecipeError, match=r"removes nothing .* more than 0\.15"):
        choose(importance(some), some, 0.1, ("heads",), 1)


def test_experts_leave_whole_or_by_channels_as_the_loss_says():
    # 40 %: expert 0 has importance 1 and 200 parameters; of the other three each loses channels of 66.7 parameters.
    cheap = importance(MIXTURE, heads=1000, mlp=1)
    assert sizes(choose(cheap, MIXTURE, 0.4, ("mlp", "experts"), 1)) == (2, 13, 3)
    assert sizes(choose(importance(MIXTURE, experts=1000), MIXTURE, 0.4, ("mlp", "experts"), 1)) == (2, 10, 4)
    assert sizes(choose(importance(MIXTURE), MIXTURE, 0.4, ("experts",), 1)) == (2, 20, 2)
    with pytest.raises(RecipeError, match=r"largest reachable ratio is 0\.4"):
        choose(importance(MIXTURE), MIXTURE, 0.6, ("experts",), 1)  # a token uses two


def test_every_expert_chooses_its_own_channels():
    values = np.random.default_rng(0).random((2, 4, 20)).astype(np.float32)
    model = importance(MIXTURE)
    kept = choose(model._replace(values=(model.values[0], values, model.values[2])), MIXTURE, 0.4, ("mlp",), 1)[1]
    assert kept.shape == (2, 4, 10)
    for layer in range(2):
        for expert in range(4):
            assert kept[layer, expert].tolist() == sorted(np.argsort(-values[layer, expert])[:10].tolist())


def test_the_loss_counts_channels_of_the_experts_that_stay():
    # Expert 0 costs nothing and its channels cost most: it leaves, and only channels of the others, which are cheap, count.
    channel_values = np.ones((2, 4, 20), np.float32)
    channel_values[:, 0] = 1000
    expert_values = np.broadcast_to(np.array([0, 1e6, 1e6, 1e6], np.float32), (2, 1, 4))
    found = Importance((np.full((2, 1, 2), 1e9, np.float32), channel_values, expert_values), {})
    assert sizes(choose(found, MIXTURE, 0.25, "auto", 1)) == (2, 18, 3)


def test_dense_blocks_beside_mixtures_lose_the_same_share():
    # Block 0 has 4 experts of 20 channels, block 1 is dense with 60 channels: 800 + 600 parameters of channels.
    mixed = layout(channels(60, None, (1,)), channels(20, 4, (0,)), experts(4, 200, least=2, layers=(0,)), block_params=700)
    kept = choose(importance(mixed), mixed, 0.5, ("mlp",), 1)
    assert sizes(kept) == (30, 10, 4)
    assert removed_ratio(mixed, (30, 10, 4)) == 0.5


@given(
    ratio=st.floats(0.01, 0.95),
    num_heads=st.integers(1, 9),
    num_channels=st.integers(2, 200),
    head_params=st.integers(10, 500),
    round_to=st.integers(1, 64),
    seed=st.integers(0, 5),
)
def test_sizes_are_legal_and_near_the_ratio(ratio, num_heads, num_channels, head_params, round_to, seed):
    block = num_heads * head_params + num_channels * 10 + 16
    model = layout(heads(num_heads, head_params), channels(num_channels), block_params=block)
    rng = np.random.default_rng(seed)
    drawn = Importance((rng.random((2, 1, num_heads), np.float32), rng.random((2, 1, num_channels), np.float32)), {})
    try:
        kept_heads, kept_channels = sizes(choose(drawn, model, ratio, "auto", round_to))
    except RecipeError:
        return
    unit = round_to if num_channels >= round_to else 1
    assert 1 <= kept_heads <= num_heads
    assert kept_channels == num_channels or (kept_channels % unit == 0 and kept_channels >= unit)
    reached = removed_ratio(model, (kept_heads, kept_channels))
    if num_heads - kept_heads <= ratio * num_heads + 1e-9:
        assert abs(reached - ratio) * block <= unit * 10 / 2 + 1e-6


@given(
    ratio=st.floats(0.05, 0.7),
    num_experts=st.integers(2, 16),
    num_channels=st.integers(2, 64),
    round_to=st.sampled_from([1, 8]),
    seed=st.integers(0, 3),
)
def test_mixtures_keep_legal_sizes_near_the_ratio(ratio, num_experts, num_channels, round_to, seed):
    params = num_channels * 10 + 5
    groups = (heads(3, 50), channels(num_channels, num_experts), experts(num_experts, params, least=2))
    block = 150 + num_experts * params
    model = layout(*groups, block_params=block)
    rng = np.random.default_rng(seed)
    shapes = [(2, 1, 3), (2, num_experts, num_channels), (2, 1, num_experts)]
    try:
        kept = choose(Importance(tuple(rng.random(shape, np.float32) for shape in shapes), {}), model, ratio, "auto", round_to)
    except RecipeError:
        return
    kept_heads, _, kept_experts = sizes(kept)
    assert kept_experts >= 2
    if max(1 - kept_heads / 3, 1 - kept_experts / num_experts) <= ratio + 1e-9:
        unit = round_to if num_channels >= round_to else 1
        step = max(unit, num_channels % unit) * 10 * kept_experts
        assert abs(removed_ratio(model, sizes(kept)) - ratio) * block <= step / 2 + 1e-6
