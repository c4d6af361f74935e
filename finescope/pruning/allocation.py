"""Allocation: how many groups of each kind a block loses, and which. Sizes are equal in every block."""

import math
from typing import Literal, NamedTuple

import numpy as np

from finescope.errors import RecipeError
from finescope.pruning.groups import Groups
from finescope.pruning.importance import Importance

Structure = Literal["auto"] | tuple[Literal["heads", "mlp"], ...]


class Kept(NamedTuple):
    """The groups that stay, ascending; as many in every layer."""

    heads: list[np.ndarray]  # a layer: int64 [kept key/value heads]
    mlp: list[np.ndarray]  # a layer: int64 [kept channels]


def choose(importance: Importance, groups: Groups, ratio: float, structure: Structure, round_to: int) -> Kept:
    """The groups to keep, so that about `ratio` of the block parameters leave: within half of what one rounding step holds.

    With both kinds ('auto', or both named) each count of removed key/value heads up to ratio * num_kv_heads is tried, channels
    fill the rest, and the split whose removed groups have the smallest summed importance is taken. At least one key/value
    head and `round_to` channels stay; the channels kept are all, or a multiple of `round_to` (of 1 in an MLP smaller than that).

    Raises:
        RecipeError: the ratio cannot be reached or removes nothing, or `structure` names no kind.
    """
    kinds = ("heads", "mlp") if structure == "auto" else tuple(structure)
    if not kinds:
        raise RecipeError("prune.structure is empty: expected 'auto' or a list of heads, mlp")
    splits = _splits(groups, ratio, kinds, round_to) if ratio else [(groups.num_kv_heads, groups.num_channels)]
    if not splits:
        reachable = _largest_ratio(groups, kinds, round_to)
        raise RecipeError(
            f"prune.ratio {ratio} cannot be reached with structure {list(kinds)} and round_to {round_to}: "
            f"the largest reachable ratio is {math.floor(reachable * 1e4) / 1e4}"
        )
    heads_kept, channels_kept = min(splits, key=lambda split: _estimated_loss(importance, groups, *split))
    if ratio and (heads_kept, channels_kept) == (groups.num_kv_heads, groups.num_channels):
        raise RecipeError(
            f"prune.ratio {ratio} removes nothing with structure {list(kinds)} and round_to {round_to}: "
            f"expected 0 or at least {math.ceil(_smallest_step(groups, kinds, round_to) * 1e4) / 1e4}"
        )
    return Kept(
        heads=[_largest(values, heads_kept) for values in importance.heads],
        mlp=[_largest(values, channels_kept) for values in importance.mlp],
    )


def removed_ratio(groups: Groups, heads_kept: int, channels_kept: int) -> float:
    """Share of the block parameters that leave."""
    heads = (groups.num_kv_heads - heads_kept) * groups.head_params
    return (heads + (groups.num_channels - channels_kept) * groups.channel_params) / groups.block_params


def _splits(groups: Groups, ratio: float, kinds: tuple[str, ...], round_to: int) -> list[tuple[int, int]]:
    """The (heads kept, channels kept) that reach the ratio, fewest heads removed first."""
    target = ratio * groups.block_params
    if "mlp" not in kinds:
        removed = math.floor(target / groups.head_params + 0.5)
        return [(groups.num_kv_heads - removed, groups.num_channels)] if removed < groups.num_kv_heads else []
    counts = range(groups.num_kv_heads if "heads" in kinds else 1)
    channels = {count: _channels_kept(groups, target - count * groups.head_params, round_to) for count in counts}
    feasible = [(count, kept) for count, kept in channels.items() if kept >= _unit(groups, round_to)]
    # The margin forgives ratio * num_kv_heads that falls just under a whole number in floating point.
    proportionate = [split for split in feasible if split[0] <= ratio * groups.num_kv_heads + 1e-9]
    return [(groups.num_kv_heads - count, kept) for count, kept in proportionate or feasible[:1]]


def _channels_kept(groups: Groups, target: float, round_to: int) -> int:
    """Channels kept when about `target` parameters of one MLP leave; below one unit: out of reach."""
    ideal = min(groups.num_channels, groups.num_channels - target / groups.channel_params)
    unit = _unit(groups, round_to)
    kept = unit * math.floor(ideal / unit + 0.5)
    # An MLP that is no multiple of the unit may also stay whole, where that is nearest.
    whole_is_nearer = groups.num_channels - ideal < abs(kept - ideal)
    return groups.num_channels if kept > groups.num_channels or whole_is_nearer else kept


def _unit(groups: Groups, round_to: int) -> int:
    return round_to if groups.num_channels >= round_to else 1


def _largest_ratio(groups: Groups, kinds: tuple[str, ...], round_to: int) -> float:
    heads = 1 if "heads" in kinds else groups.num_kv_heads
    channels = _unit(groups, round_to) if "mlp" in kinds else groups.num_channels
    return removed_ratio(groups, heads, channels)


def _smallest_step(groups: Groups, kinds: tuple[str, ...], round_to: int) -> float:
    """The smallest ratio that rounds to something removed."""
    if "mlp" not in kinds:
        return groups.head_params / 2 / groups.block_params
    unit = _unit(groups, round_to)
    step = groups.num_channels % unit or unit
    return step / 2 * groups.channel_params / groups.block_params


def _estimated_loss(importance: Importance, groups: Groups, heads_kept: int, channels_kept: int) -> float:
    """Summed importance of the groups that leave, over all layers."""
    heads = sum(float(np.sort(values)[: groups.num_kv_heads - heads_kept].sum(dtype=np.float64)) for values in importance.heads)
    mlp = sum(float(np.sort(values)[: groups.num_channels - channels_kept].sum(dtype=np.float64)) for values in importance.mlp)
    return heads + mlp


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, ascending; of equal values the first stays."""
    return np.sort(np.argsort(-values, kind="stable")[:count]).astype(np.int64)
