"""Sums over the groups of a parameter, and the rows or columns of those that stay."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finescope.models.cuts import Cut
from finescope.models.groups import Layout

# For each of `Layout.groups` the groups that stay: int64 [its layers, rows, kept], ascending along a row.
Kept = tuple[np.ndarray, ...]


def all_of(layout: Layout) -> Kept:
    """Every group stays."""
    return tuple(np.tile(np.arange(groups.number), (len(groups.layers), groups.rows, 1)) for groups in layout.groups)


class Place(NamedTuple):
    """A cut of one block's parameter, and where what is known of its groups is kept."""

    cut: Cut
    parts: tuple[tuple[int, int], ...]  # along the axis: a length, and how many groups divide it evenly; 0: of no group
    which: int  # of `Layout.groups`
    position: int  # of the block among the layers of those


def places_of(layout: Layout, layer: int) -> tuple[Place, ...]:
    """Every cut of a block, those by expert first."""
    sizes = layout.parts[layer]
    return tuple(
        Place(cut, tuple(sizes[part] for part in cut.parts), *layout.find(cut.kind, layer)) for cut in layout.cuts[layer]
    )


def owners_of(parts: Sequence[tuple[int, int]]) -> Tensor:
    """The group of each row (or column) along a cut: int64 [size of the axis], -1 where it is of none."""
    owners = [
        torch.arange(groups).repeat_interleave(length // groups) if groups else torch.full((length,), -1)
        for length, groups in parts
    ]
    return torch.cat(owners)


def add_sums(sums: Tensor, values: Tensor, place: Place, stretch: slice, weight: int = 1) -> None:
    """Add to `sums`, float64 [rows, number], those of `values` over each group, `weight` times.

    `values` are of the parameter's shape, or of one `stretch` of its first axis: of a few experts.
    """
    along = values.movedim(place.cut.axis, -1)  # by expert: [experts, across, along]
    along = along.reshape(values.shape[0] if place.cut.by_expert else 1, -1, along.shape[-1]).sum(dim=1)
    if place.cut.by_expert:
        sums, parts = sums[stretch], place.parts
    elif "expert" in place.cut.parts:
        sums, parts = sums[:, stretch], [(along.shape[-1], along.shape[-1])]
    else:
        parts = place.parts
    # Part by part and not by index, so that a GPU adds in one order every time.
    for part, (_, groups) in zip(along.split([length for length, _ in parts], dim=-1), parts, strict=True):
        if groups:
            sums += weight * part.reshape(len(part), groups, -1).sum(dim=-1).to(sums.dtype)


def stretches(places: Sequence[Place], experts: Sequence[int]) -> list[slice]:
    """How a parameter is summed: whole, or one of `experts` after the other, so that no product of all of them is made."""
    if any(place.cut.by_expert for place in places):
        return [slice(expert, expert + 1) for expert in experts]
    return [slice(None)]


def take(values: Tensor, place: Place, kept: np.ndarray) -> Tensor:
    """The rows (or columns) of a parameter that stay: `kept` is int64 [rows, groups], as `Kept` has it for the block."""
    owners = owners_of(place.parts)
    stays = [_indices(owners, groups).to(values.device) for groups in kept]
    if place.cut.by_expert:
        experts = zip(values, stays, strict=True)
        return torch.stack([expert.index_select(place.cut.axis - 1, indices) for expert, indices in experts])
    (indices,) = stays
    return values.index_select(place.cut.axis, indices)


def _indices(owners: Tensor, kept: np.ndarray) -> Tensor:
    return torch.nonzero((owners < 0) | torch.isin(owners, torch.from_numpy(kept)))[:, 0]
