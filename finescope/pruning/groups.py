"""Sums over the groups of a parameter, and the rows or columns of those that stay."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finescope.models.cuts import Cut, Part
from finescope.models.groups import Layout

# For each of `Layout.groups` the groups that stay: int64 [its layers, rows, kept], ascending along a row.
Kept = tuple[np.ndarray, ...]


class Place(NamedTuple):
    """A cut of one block's parameter, and where what is known of its groups is kept."""

    cut: Cut
    owners: Tensor  # int64 [size of the axis]: the group of each row or column; -1: of none
    index: int  # of `Layout.groups`
    position: int  # of the block among the layers of those


def places_of(layout: Layout, layer: int) -> tuple[Place, ...]:
    """Every cut of a block, those by expert first."""
    return tuple(Place(cut, owners_of(cut, layout.parts[layer]), *layout.find(cut.kind, layer)) for cut in layout.cuts[layer])


def owners_of(cut: Cut, parts: Mapping[Part, tuple[int, int]]) -> Tensor:
    """The group of each row (or column) along a cut: int64 [size of the axis], -1 where all groups share it."""
    owners = []
    for part in cut.parts:
        length, groups = parts[part]
        owners.append(torch.arange(groups).repeat_interleave(length // groups) if groups else torch.full((length,), -1))
    return torch.cat(owners)


def add_sums(sums: Tensor, values: Tensor, place: Place, stretch: slice, weight: int = 1) -> None:
    """Add to `sums`, float64 [rows, count], those of `values` over each group, `weight` times.

    `values` are of the parameter's shape, or of one `stretch` of its first axis: of a few experts.
    """
    owners = (place.owners[stretch] if place.cut.axis == 0 else place.owners).to(values.device)
    along = values.movedim(place.cut.axis, -1)  # by expert: [experts, across, along]
    along = along.reshape(values.shape[0] if place.cut.by_expert else 1, -1, along.shape[-1]).sum(dim=1)
    grouped = owners >= 0
    target = sums[stretch] if place.cut.by_expert else sums
    target.index_add_(1, owners[grouped], along[:, grouped].to(sums.dtype), alpha=weight)


def stretches(places: Sequence[Place], experts: Sequence[int]) -> list[slice]:
    """How a parameter is summed: whole, or one of `experts` after the other, so that no product of all of them is made."""
    if any(place.cut.by_expert for place in places):
        return [slice(expert, expert + 1) for expert in experts]
    return [slice(None)]


def take(values: Tensor, place: Place, kept: np.ndarray) -> Tensor:
    """The rows (or columns) of a parameter that stay: `kept` is int64 [rows, groups], as `Kept` has it for the block."""
    stays = [_indices(place.owners, groups).to(values.device) for groups in kept]
    if place.cut.by_expert:
        experts = zip(values, stays, strict=True)
        return torch.stack([expert.index_select(place.cut.axis - 1, indices) for expert, indices in experts])
    (indices,) = stays
    return values.index_select(place.cut.axis, indices)


def _indices(owners: Tensor, kept: np.ndarray) -> Tensor:
    return torch.nonzero((owners < 0) | torch.isin(owners, torch.from_numpy(kept)))[:, 0]
