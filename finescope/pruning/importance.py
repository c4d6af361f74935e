"""Importance of each group: what all methods have in common, and the two that run no tokens, magnitude and random."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finescope.errors import StepFailed
from finescope.models.blocks import Blocks
from finescope.models.groups import Layout
from finescope.pruning.groups import Place, add_sums, places_of, stretches


class Importance(NamedTuple):
    """One number a group, the same unit for all kinds; larger is more important."""

    values: tuple[np.ndarray, ...]  # for each of `Layout.groups`: float32 [its layers, rows, number]
    expert_tokens: dict[int, np.ndarray]  # where tokens were run, by layer with experts: tokens that each got, int64 [experts]


@torch.no_grad()
def magnitude_importance(source: Blocks, layout: Layout) -> Importance:
    """Sum of squared parameters of each group (LLM-Pruner's L2 magnitude)."""
    sums = group_sums(layout, source.model.device)
    for layer in range(layout.num_layers):
        with source.block(layer) as block:
            for name, places in scored(layout, layer).items():
                parameter = block.get_parameter(name)
                for stretch in stretches(places, range(len(parameter))):
                    squares = parameter[stretch].float().square()
                    for place in places:
                        add_sums(sums[place.which][place.position], squares, place, stretch)
    return importance_of(sums, layout, source, {})


def random_importance(layout: Layout, seed: int) -> Importance:
    """Uniform in [0, 1) a parameter: scaled by the group's parameters, so that no kind is the cheaper one by its size."""
    rng = np.random.default_rng(seed)
    shapes = [(len(groups.layers), groups.rows, groups.number) for groups in layout.groups]
    drawn = [rng.random(shape) * groups.params for shape, groups in zip(shapes, layout.groups, strict=True)]
    return Importance(tuple(values.astype(np.float32) for values in drawn), {})


def group_sums(layout: Layout, device: torch.device) -> list[Tensor]:
    """Zeros to add up in, for each of `Layout.groups`: float64 [its layers, rows, number]."""
    shapes = [(len(groups.layers), groups.rows, groups.number) for groups in layout.groups]
    return [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]


def importance_of(sums: list[Tensor], layout: Layout, source: Blocks, expert_tokens: dict[int, Tensor]) -> Importance:
    """What was added up, as importance.

    Raises:
        StepFailed: it is not finite.
    """
    values = tuple(totals.float().cpu().numpy() for totals in sums)
    for groups, found in zip(layout.groups, values, strict=True):
        for layer, block in zip(groups.layers, found, strict=True):
            if not np.isfinite(block).all():
                place = f"{source.anatomy.blocks}.{layer}"
                raise StepFailed(
                    f"importance: {groups.kind} of {place} is not finite (dtype {source.model.dtype}); use float32 or bfloat16"
                )
    return Importance(values, {layer: tokens.cpu().numpy() for layer, tokens in sorted(expert_tokens.items())})


def scored(layout: Layout, layer: int) -> dict[str, list[Place]]:
    """The parameters of a block that say how important its groups are, and their groups."""
    found: dict[str, list[Place]] = {}
    for place in places_of(layout, layer):
        if place.cut.scored:
            found.setdefault(place.cut.parameter, []).append(place)
    return found
