"""Groups: the parameters of a model that leave together, how many there are, and how many may stay."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from finescope.errors import ModelError, RecipeError
from finescope.models.anatomy import Anatomy, blocks_of, has_experts, input_width, linear_map
from finescope.models.cuts import KINDS, Cut, Kind, Part, cuts_of
from finescope.models.resize import resized

# Channels of an expert: transformers multiplies all experts at once, by kernels that want rows of whole 16 bytes.
_ALIGNMENT = 8


class Groups(NamedTuple):
    """Groups of one kind in blocks that are alike in it; equally many of them stay in each row of each block."""

    kind: Kind
    layers: tuple[int, ...]  # the blocks that have them, 0-based
    by_expert: bool  # channels of experts: a row for each
    rows: int  # experts where `by_expert`, else 1
    number: int  # groups of a row
    params: int  # parameters of one group
    allowed: tuple[int, ...]  # how many of a row may stay, ascending; the last is `number`
    setting: str  # of the configuration, that holds `number`; empty for heads, which need three


class Heads(NamedTuple):
    """The attention of a block; every block has the same."""

    num_query: int
    num_kv: int
    head_dim: int

    @property
    def groups(self) -> int:
        """One per key/value head; where all query heads share one, each of them is a group, and key and value belong to none."""
        return self.num_kv if self.num_kv > 1 else self.num_query

    def kept(self, groups: int) -> "Heads":
        """The attention that `groups` groups make up."""
        return Heads(groups * self.num_query // self.groups, groups if self.num_kv > 1 else 1, self.head_dim)


class Layout(NamedTuple):
    """The groups of a model."""

    groups: tuple[Groups, ...]  # in the order of KINDS, channels of dense blocks before those of experts
    heads: Heads
    parts: tuple[dict[Part, tuple[int, int]], ...]  # a layer: the length of each part of an axis, and the groups that share it
    cuts: tuple[tuple[Cut, ...], ...]  # a layer: where its parameters are cut
    num_layers: int  # decoder blocks
    block_params: int  # parameters of all blocks, their norms counted
    model_params: int  # parameters of the whole model, tied weights counted once
    refused: dict[Kind, str]  # kinds of which nothing can be removed, and why

    def find(self, kind: Kind, layer: int) -> tuple[int, int]:
        """Which of `groups` a block has of a kind, and which of that one's layers the block is."""
        (found,) = [index for index, groups in enumerate(self.groups) if groups.kind == kind and layer in groups.layers]
        return found, self.groups[found].layers.index(layer)


def layout_of(model: PreTrainedModel, anatomy: Anatomy) -> Layout:
    """Find and count the groups of `model`; its weights may be on the meta device.

    Raises:
        ModelError: a weight is quantised, or blocks that should be alike differ in shape.
    """
    blocks = blocks_of(model, anatomy)
    heads = _heads(model, blocks[0], anatomy)
    cuts = tuple(cuts_of(block, anatomy.cuts) for block in blocks)
    alike: dict[bool, list[int]] = {}  # dense blocks, and mixtures of experts
    for layer, block in enumerate(blocks):
        alike.setdefault(has_experts(block, anatomy), []).append(layer)
    for layers in alike.values():
        _check_alike(blocks, cuts, layers, anatomy)
    parts = tuple(_parts(block, anatomy, heads) for block in blocks)
    found: list[Groups] = []
    if any(cut.kind == "heads" for cut in cuts[0]):
        layers = tuple(range(len(blocks)))
        found.append(Groups("heads", layers, False, 1, heads.groups, 0, _head_counts(model, heads), ""))
    for mixture, layers in sorted(alike.items()):
        found += _mlp_groups(model, anatomy, tuple(layers), parts[layers[0]], mixture)
    found = [groups._replace(params=_params(blocks, cuts, parts, groups)) for groups in found]
    return Layout(
        groups=tuple(sorted(found, key=lambda groups: KINDS.index(groups.kind))),
        heads=heads,
        parts=parts,
        cuts=cuts,
        num_layers=len(blocks),
        block_params=sum(parameter.numel() for block in blocks for parameter in block.parameters()),
        model_params=sum(parameter.numel() for parameter in model.parameters()),
        refused=_refused(found, anatomy, heads, type(model.config).__name__),
    )


def settings_of(layout: Layout, kept: Sequence[int]) -> dict[str, int]:
    """The settings of the configuration where `kept` groups stay in a row of each of `layout.groups`."""
    settings: dict[str, int] = {}
    for groups, count in zip(layout.groups, kept, strict=True):
        settings |= {groups.setting: count} if groups.setting else _head_settings(layout.heads.kept(count))
    return settings


def kinds_of(layout: Layout, structure: Literal["auto"] | tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The kinds of groups that `prune.structure` names; `auto` names every kind of which the model can lose some.

    Raises:
        RecipeError: a kind is named of which nothing can be removed, or none is.
    """
    able: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind not in layout.refused)
    named = able if isinstance(structure, str) else structure
    if not named:
        raise RecipeError(f"prune.structure is empty: expected auto or a list of {', '.join(able)}")
    for kind in named:
        if kind in layout.refused:
            raise RecipeError(
                f"prune.structure: no {kind} can be removed from this model: {layout.refused[kind]}; "
                f"expected auto or a list of {', '.join(able)}"
            )
    return named


def _heads(model: PreTrainedModel, block: nn.Module, anatomy: Anatomy) -> Heads:
    num_query = int(model.config.num_attention_heads)
    num_kv = int(getattr(model.config, "num_key_value_heads", None) or num_query)
    return Heads(num_query, num_kv, input_width(linear_map(block, anatomy.output)) // num_query)


def _head_settings(heads: Heads) -> dict[str, int]:
    # The size of a head no longer follows from their number: it is written out.
    return {"num_attention_heads": heads.num_query, "num_key_value_heads": heads.num_kv, "head_dim": heads.head_dim}


def _head_counts(model: PreTrainedModel, heads: Heads) -> tuple[int, ...]:
    counts = range(1, heads.groups)
    able = [count for count in counts if resized(model.config, _head_settings(heads.kept(count))) is not None]
    return (*able, heads.groups)


def _parts(block: nn.Module, anatomy: Anatomy, heads: Heads) -> dict[Part, tuple[int, int]]:
    shared = 0 if heads.num_kv < heads.groups else heads.groups  # a key and value that all query heads need leave with none
    query, key = heads.num_query * heads.head_dim, heads.num_kv * heads.head_dim
    parts: dict[Part, tuple[int, int]] = {"query": (query, heads.groups), "key": (key, shared), "value": (key, shared)}
    if has_experts(block, anatomy):
        experts, _, channels = block.get_parameter(f"{anatomy.experts}.down_proj").shape
        parts["expert"] = (experts, experts)
    else:
        channels = input_width(linear_map(block, anatomy.down))
    parts["channel"] = (channels, channels)
    return parts


def _mlp_groups(
    model: PreTrainedModel, anatomy: Anatomy, layers: tuple[int, ...], parts: dict[Part, tuple[int, int]], mixture: bool
) -> list[Groups]:
    names, channels = dict(anatomy.sizes), parts["channel"][0]
    if not mixture:
        return [Groups("mlp", layers, False, 1, channels, 0, tuple(range(1, channels + 1)), names["channels"])]
    aligned = (*range(_ALIGNMENT, channels, _ALIGNMENT), channels)
    experts, least = parts["expert"][0], int(model.config.num_experts_per_tok)
    return [
        Groups("mlp", layers, True, experts, channels, 0, aligned, names["expert_channels"]),
        Groups("experts", layers, False, 1, experts, 0, tuple(range(least, experts + 1)), names["experts"]),
    ]


def _params(
    blocks: Sequence[nn.Module], cuts: Sequence[Sequence[Cut]], parts: Sequence[dict[Part, tuple[int, int]]], groups: Groups
) -> int:
    """Parameters of one group: what is shared by all (key and value in multi-query attention) is of none."""
    layer, total = groups.layers[0], 0
    for cut in cuts[layer]:
        if cut.kind == groups.kind:
            parameter = blocks[layer].get_parameter(cut.parameter)
            lengths = [parts[layer][part] for part in cut.parts]
            total += parameter.numel() // parameter.shape[cut.axis] * sum(length for length, shared_by in lengths if shared_by)
    return total // (groups.rows * groups.number)


def _check_alike(blocks: Sequence[nn.Module], cuts: Sequence[Sequence[Cut]], layers: Sequence[int], anatomy: Anatomy) -> None:
    shapes = []
    for layer in layers:
        parameters = {cut.parameter: blocks[layer].get_parameter(cut.parameter) for cut in cuts[layer]}
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise ModelError(f"'{anatomy.blocks}.{layer}.{name}' is quantised: pruning needs floating-point weights")
        shapes.append({name: tuple(parameter.shape) for name, parameter in parameters.items()})
        if shapes[-1] != shapes[0]:
            place, first = f"'{anatomy.blocks}.{layer}'", f"{anatomy.blocks}.{layers[0]}"
            raise ModelError(f"{place} has other shapes than {first}: {shapes[-1]}, expected {shapes[0]}")


def _refused(found: Sequence[Groups], anatomy: Anatomy, heads: Heads, config: str) -> dict[Kind, str]:
    no_heads = "it has one" if heads.groups == 1 else f"{config} accepts no other number of heads of {heads.head_dim}"
    reasons: dict[Kind, str] = {
        "heads": anatomy.fixed_heads or no_heads,
        "experts": "it has no experts" if anatomy.experts is None else "every token uses all experts",
        "mlp": "its MLP has one channel",
    }
    able = {groups.kind for groups in found if len(groups.allowed) > 1}
    return {kind: reason for kind, reason in reasons.items() if kind not in able}
