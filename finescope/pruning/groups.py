"""Groups: the parameters that leave together. A key/value head with its query heads, or one MLP channel."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finescope.errors import ModelError
from finescope.models.anatomy import Anatomy, blocks_of, linear, require_prunable

Kind = Literal["heads", "mlp"]


class Groups(NamedTuple):
    """How the groups of a model are laid out; every block has the same."""

    num_layers: int  # decoder blocks
    d_model: int  # width of the residual stream
    head_dim: int
    num_kv_heads: int  # head groups of a block: one per key/value head
    queries_per_kv: int  # query heads that share a key/value head and leave with it
    num_channels: int  # channel groups of a block: rows of gate and up, columns of down
    head_params: int  # parameters of one head group
    channel_params: int  # parameters of one channel group
    block_params: int  # parameters of one block, its norms counted
    model_params: int  # parameters of the whole model, tied weights counted once


class GroupSlice(NamedTuple):
    """Where one linear map of a block keeps its share of each group."""

    name: str  # of the linear map, relative to the block
    kind: Kind
    axis: Literal[0, 1]  # of the weight [out, in]; a bias [out] is sliced with axis 0 and stays whole with axis 1
    width: int  # rows or columns of one group, adjacent


def groups_of(model: PreTrainedModel, anatomy: Anatomy) -> Groups:
    """Count the groups of `model` and their parameters.

    Raises:
        ModelError: the family cannot be pruned yet, a weight is quantised, or the blocks differ in shape.
    """
    require_prunable(anatomy)
    blocks = blocks_of(model, anatomy)
    shapes = [[tuple(linear(block, name).weight.shape) for name in anatomy.block_linears] for block in blocks]
    for index, (block, found) in enumerate(zip(blocks, shapes, strict=True)):
        if found != shapes[0]:
            raise ModelError(f"'{anatomy.blocks}.{index}' has other shapes than the first block: {found}, expected {shapes[0]}")
        for name in anatomy.block_linears:
            if not linear(block, name).weight.is_floating_point():
                raise ModelError(f"'{anatomy.blocks}.{index}.{name}' is quantised: pruning needs floating-point weights")
    config, first = model.config, blocks[0]
    num_kv_heads = int(config.num_key_value_heads or config.num_attention_heads)
    key, gate = linear(first, anatomy.key), linear(first, anatomy.gate)
    layout = Groups(
        num_layers=len(blocks),
        d_model=key.in_features,
        head_dim=key.out_features // num_kv_heads,
        num_kv_heads=num_kv_heads,
        queries_per_kv=int(config.num_attention_heads) // num_kv_heads,
        num_channels=gate.out_features,
        head_params=0,
        channel_params=0,
        block_params=sum(parameter.numel() for parameter in first.parameters()),
        model_params=sum(parameter.numel() for parameter in model.parameters()),
    )
    counts = {"heads": 0, "mlp": 0}
    for part in group_slices(anatomy, layout):
        module = linear(first, part.name)
        across = module.in_features if part.axis == 0 else module.out_features
        bias = part.axis == 0 and module.bias is not None
        counts[part.kind] += part.width * (across + bias)
    return layout._replace(head_params=counts["heads"], channel_params=counts["mlp"])


def group_slices(anatomy: Anatomy, groups: Groups) -> tuple[GroupSlice, ...]:
    """The seven linear maps of a block and how each is divided into groups."""
    query_width = groups.queries_per_kv * groups.head_dim
    return (
        GroupSlice(anatomy.query, "heads", 0, query_width),
        GroupSlice(anatomy.key, "heads", 0, groups.head_dim),
        GroupSlice(anatomy.value, "heads", 0, groups.head_dim),
        GroupSlice(anatomy.output, "heads", 1, query_width),
        GroupSlice(anatomy.gate, "mlp", 0, 1),
        GroupSlice(anatomy.up, "mlp", 0, 1),
        GroupSlice(anatomy.down, "mlp", 1, 1),
    )


def group_sums(values: Tensor, part: GroupSlice) -> Tensor:
    """Sums of `values` over each group: [out, in], or a bias's [out] with axis 0, to [groups]."""
    if part.axis == 0:
        return values.reshape(values.shape[0] // part.width, -1).sum(dim=1)
    return values.reshape(values.shape[0], -1, part.width).sum(dim=(0, 2))


def group_indices(kept: Tensor, width: int) -> Tensor:
    """Rows (or columns) of the kept groups: int64 [groups] to int64 [groups * width]."""
    return (kept[:, None] * width + torch.arange(width, device=kept.device)).reshape(-1)
