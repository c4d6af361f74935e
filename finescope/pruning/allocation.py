"""Allocation: how many groups of each kind a block loses, and which. Sizes are equal in every block."""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from finescope.errors import RecipeError
from finescope.models.cuts import Kind
from finescope.models.groups import Groups, Layout, kinds_of
from finescope.pruning.groups import Kept
from finescope.pruning.importance import Importance

Structure = Literal["auto"] | tuple[Kind, ...]
Counts = tuple[int, ...]  # for each of `Layout.groups` how many stay in a row

# The kinds that fill what the others leave of the ratio, the finest first.
_FINEST: tuple[Kind, ...] = ("mlp", "experts", "heads")


def choose(importance: Importance, layout: Layout, ratio: float, structure: Structure, round_to: int, *, required: bool) -> Kept:
    """The groups to keep, so that about `ratio` of the block parameters leave: within half of what one rounding step holds.

    With several kinds ('auto': all that the model has) each count of removed heads and experts up to `ratio` of them is tried,
    channels fill the rest, and the split whose removed groups have the smallest summed importance is taken. The channels kept
    are all, or a multiple of `round_to` (of 1 in an MLP smaller than that); of experts as many stay as a token uses, or more.
    `required`: a ratio above 0 must remove something.

    Raises:
        RecipeError: the ratio cannot be reached, or removes nothing though it must, or `structure` names a kind that the model
            cannot lose.
    """
    kinds = kinds_of(layout, structure)
    whole = tuple(groups.number for groups in layout.groups)
    options = [_options(groups, round_to) if groups.kind in kinds else (groups.number,) for groups in layout.groups]
    given = f"structure {list(kinds)} and round_to {round_to}"
    splits = _splits(layout, ratio, kinds, options) if ratio else [whole]
    if not splits:
        reachable = removed_ratio(layout, tuple(counts[0] for counts in options))
        raise RecipeError(
            f"prune.ratio {ratio} cannot be reached with {given}: "
            f"the largest reachable ratio is {math.floor(reachable * 1e4) / 1e4}"
        )
    loss = _Loss(importance, layout)
    best = min(splits, key=loss)
    if required and ratio and best == whole:
        raise RecipeError(
            f"prune.ratio {ratio} removes nothing with {given}: "
            f"expected 0 or more than {math.ceil(_smallest_step(layout, kinds, options) * 1e4) / 1e4}"
        )
    return tuple(_largest(values, count) for values, count in zip(importance.values, best, strict=True))


def removed_ratio(layout: Layout, counts: Counts) -> float:
    """Share of the block parameters that leave where `counts` groups stay."""
    return _removed_params(layout, counts) / layout.block_params


def _options(groups: Groups, round_to: int) -> Counts:
    """How many may stay, ascending."""
    if groups.kind != "mlp" or groups.number < round_to:
        return groups.allowed
    return tuple(count for count in groups.allowed if count % round_to == 0 or count == groups.number)


def _filler(kinds: Sequence[Kind]) -> Kind:
    return next(kind for kind in _FINEST if kind in kinds)


def _splits(layout: Layout, ratio: float, kinds: Sequence[Kind], options: Sequence[Counts]) -> list[Counts]:
    """The counts that reach the ratio, fewest removed first."""
    filler = _filler(kinds)
    free = [groups.kind != filler and len(counts) > 1 for groups, counts in zip(layout.groups, options, strict=True)]
    tried = [counts[::-1] if varies else (counts[-1],) for counts, varies in zip(options, free, strict=True)]
    filled = (_fill(layout, ratio * layout.block_params, filler, options, counts) for counts in itertools.product(*tried))
    feasible = [counts for counts in filled if counts is not None]

    def share(counts: Counts) -> float:
        """The largest share of a kind, other than the filler, that leaves."""
        shares = [1 - kept / groups.number for kept, groups, varies in zip(counts, layout.groups, free, strict=True) if varies]
        return max(shares, default=0.0)

    # The margin forgives a share that equals the ratio but for rounding in floating point.
    proportionate = [counts for counts in feasible if share(counts) <= ratio + 1e-9]
    return proportionate or sorted(feasible, key=share)[:1]


def _fill(layout: Layout, target: float, filler: Kind, options: Sequence[Counts], counts: Counts) -> Counts | None:
    """`counts` with as many of the filler removed as the target of parameters needs, the same share in all blocks that have it.

    None where it needs more than there are.
    """
    missing = target - _removed_params(layout, counts)
    fills = [groups.kind == filler for groups in layout.groups]
    emptied = tuple(0 if fill else count for fill, count in zip(fills, counts, strict=True))
    available = _removed_params(layout, emptied) - _removed_params(layout, counts)
    filled = []
    for groups, count, allowed, fill in zip(layout.groups, counts, options, fills, strict=True):
        ideal = groups.number - max(0.0, missing) * groups.number / available
        # Of channels one step below the fewest is none.
        step = allowed[0] if groups.kind == "mlp" else 1
        near = _nearest((allowed[0] - step, *allowed), ideal) if fill else count
        if near < allowed[0]:
            return None
        filled.append(near)
    return tuple(filled)


def _removed_params(layout: Layout, counts: Counts) -> int:
    """Parameters that leave. The channels of an expert that leaves go with it, and only the others lose channels of their own."""
    removed = 0
    for groups, count in zip(layout.groups, counts, strict=True):
        rows = counts[_experts_of(layout, groups)] if groups.by_expert else groups.rows
        removed += len(groups.layers) * rows * (groups.number - count) * groups.params
    return removed


def _experts_of(layout: Layout, groups: Groups) -> int:
    """Which of `layout.groups` are the experts that have these channels."""
    return layout.find("experts", groups.layers[0])[0]


def _nearest(allowed: Counts, ideal: float) -> int:
    """The allowed count that is nearest; of two that are as near the larger."""
    above = bisect.bisect_left(allowed, ideal)
    return min(allowed[max(0, above - 1) : above + 1], key=lambda count: (abs(count - ideal), -count))


def _smallest_step(layout: Layout, kinds: Sequence[Kind], options: Sequence[Counts]) -> float:
    """The largest ratio that rounds to nothing removed."""
    filler = _filler(kinds)
    emptied = tuple(0 if groups.kind == filler else groups.number for groups in layout.groups)
    steps = [
        (groups.number - counts[-2]) / 2 / groups.number
        for groups, counts in zip(layout.groups, options, strict=True)
        if groups.kind == filler and len(counts) > 1
    ]
    # An MLP of a single rounding step may only stay whole.
    return min(steps, default=1.0) * removed_ratio(layout, emptied)


class _Loss:
    """Summed importance of the groups that leave, over all layers, for any counts."""

    def __init__(self, importance: Importance, layout: Layout) -> None:
        self.layout = layout
        self.tables = []  # float64 [rows kept + 1, removed + 1]
        for groups, values in zip(layout.groups, importance.values, strict=True):
            sums = np.cumsum(np.sort(values, axis=-1), axis=-1, dtype=np.float64)  # [layers, rows, removed]
            if groups.by_expert:
                # Of the experts the most important stay.
                experts = importance.values[_experts_of(layout, groups)][:, 0]
                sums = np.take_along_axis(sums, _ranking(experts)[:, :, None], axis=1)
            by_rows = np.cumsum(sums.sum(axis=0), axis=0)
            self.tables.append(np.pad(by_rows, ((1, 0), (1, 0))))

    def __call__(self, counts: Counts) -> float:
        loss = 0.0
        for groups, count, table in zip(self.layout.groups, counts, self.tables, strict=True):
            rows = counts[_experts_of(self.layout, groups)] if groups.by_expert else groups.rows
            loss += float(table[rows, groups.number - count])
        return loss


def _ranking(values: np.ndarray) -> np.ndarray:
    """Indices along the last axis, most important first; of equal values the first."""
    return np.argsort(-values, axis=-1, kind="stable")


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest along the last axis, ascending; of equal values the first stays."""
    return np.sort(_ranking(values)[..., :count], axis=-1).astype(np.int64)
