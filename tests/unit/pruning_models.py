"""Tiny random models of every family, calibration batches, and what a pruned model must equal, for the tests of pruning."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import tiny_models
import torch
from torch import Tensor
from transformers import PreTrainedModel

from finescope.config import PruneSection
from finescope.models.anatomy import anatomy_of, blocks_of, has_experts, linear_map
from finescope.models.blocks import BlocksInMemory, without_blocks
from finescope.models.groups import Layout, layout_of
from finescope.pruning.compensation import Compensation
from finescope.pruning.groups import Kept, all_of
from finescope.pruning.measured import Clock
from finescope.pruning.prune import Places, PruneResult, prune_model
from finescope.pruning.ridge import Refit
from finescope.pruning.stream import Batch, Progress
from finescope.pruning.surgery import Surgery

FAMILIES = tiny_models.FAMILIES
FIXED_HEADS = ("gpt2", "gpt_neox")  # families that lose channels only
WITH_HEADS = tuple(family for family in FAMILIES if family not in FIXED_HEADS)
MIXTURES = ("mixtral", "qwen3_moe")
DENSE = tuple(family for family in FAMILIES if family not in MIXTURES)
VOCABULARY = 61
_GROUPED = ("num_key_value_heads", "head_dim")


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """d_model 48, 3 blocks, 6 query heads on 3 key/value heads of 8, 40 channels; biases and norms are random too.

    Of the mixtures each token uses 2 of 4 experts; the experts of Qwen3-MoE have 20 channels, and its last block is dense.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    if family in FIXED_HEADS:
        sizes = {name: size for name, size in sizes.items() if name not in _GROUPED}
    if family == "qwen3_moe":
        sizes["moe_intermediate_size"] = 20
    model = tiny_models.tiny_model(family, num_layers=3, **(sizes | changes)).to(dtype)
    model.generation_config.update(do_sample=True, temperature=0.7)
    return model


def in_memory(model: PreTrainedModel) -> BlocksInMemory:
    """A whole model as a source of blocks."""
    return BlocksInMemory(model, anatomy_of(model))


def cut(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """The student with all of its blocks in memory."""
    surgery = Surgery(model, anatomy_of(model), layout(model), kept)
    for layer, block in enumerate(blocks_of(model, anatomy_of(model))):
        surgery.cut(layer, block)
    return surgery.student


def shallow(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """The student that has the blocks `kept`, whole, and no others; in memory."""
    source = without_blocks(in_memory(model), kept)
    groups = layout_of(source.model, source.anatomy)
    surgery = Surgery(source.model, source.anatomy, groups, all_of(groups))
    for layer in range(len(kept)):
        with source.block(layer) as block:
            surgery.cut(layer, block)
    return surgery.student


def compensate(
    model: PreTrainedModel, student: PreTrainedModel, batches: list[Batch], origins: Sequence[int] = (0, 1, 2)
) -> list[Refit]:
    """Re-fit a student that is whole in memory; in place."""
    source, refits = in_memory(model), []
    compensation = Compensation(source, origins, student, batches)
    for layer, block in enumerate(blocks_of(student, source.anatomy)):
        with source.block(origins[layer]) as dense:
            compensation.follow(layer, dense)
        refits += compensation.refit(layer, block)
    return refits


def prune(model: PreTrainedModel, section: PruneSection, batches: list[Batch], progress: Progress) -> PruneResult:
    """Prune in memory."""
    return prune_model(in_memory(model), section, batches, Places(None, None), Clock(), progress)


def layout(model: PreTrainedModel) -> Layout:
    """The groups of a model."""
    return layout_of(model, anatomy_of(model))


def batches_of(lengths: tuple[tuple[int, ...], ...], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """One batch a tuple of document lengths, padded on the right with a token that is not the padding token's id."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for batch in lengths:
        mask = (torch.arange(max(batch))[None] < torch.tensor(batch)[:, None]).long()
        ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
        batches.append((torch.where(mask.bool(), ids, torch.tensor(7)), mask))
    return batches


def kept_of(model: PreTrainedModel, seed: int = 0, **counts: int) -> Kept:
    """Groups to keep at random, other ones in every layer: all, or as many of a kind as `counts` says."""
    random = np.random.default_rng(seed)
    kept = []
    for groups in layout(model).groups:
        shape, stay = (len(groups.layers), groups.rows, groups.number), counts.get(groups.kind, groups.number)
        kept.append(np.sort(random.random(shape).argsort(axis=-1)[..., :stay], axis=-1))
    return tuple(kept)


def gone(groups: Layout, kept: Kept, kind: str, layer: int) -> list[list[int]]:
    """Row by row the groups of a kind that leave a block."""
    index, position = groups.find(kind, layer)  # type: ignore[arg-type]
    return [sorted(set(range(groups.groups[index].number)) - set(row.tolist())) for row in kept[index][position]]


@torch.no_grad()
def masked(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """The dense model made to ignore what is removed, by plain slices of its own: what the pruned one must equal.

    The output maps read zeros where heads and channels are gone, routers cannot choose experts that are, and norms over all
    heads (OLMo-2) take their mean over the heads that stay.
    """
    model = copy.deepcopy(model)
    anatomy, groups = anatomy_of(model), layout(model)
    heads = groups.heads
    width = heads.num_query // heads.groups * heads.head_dim
    for layer, block in enumerate(blocks_of(model, anatomy)):
        if anatomy.family not in FIXED_HEADS:
            for head in gone(groups, kept, "heads", layer)[0]:
                linear_map(block, anatomy.output).weight[:, head * width : (head + 1) * width] = 0
            if anatomy.family == "olmo2":
                _forget_in_norms(block, gone(groups, kept, "heads", layer)[0], heads)
        channels = gone(groups, kept, "mlp", layer)
        if has_experts(block, anatomy):
            for expert, lost in enumerate(channels):
                block.get_parameter("mlp.experts.down_proj")[expert][:, lost] = 0
            _close(block.get_submodule("mlp.gate"), gone(groups, kept, "experts", layer)[0])
        elif anatomy.family == "gpt2":
            linear_map(block, anatomy.down).weight[channels[0]] = 0
        else:
            linear_map(block, anatomy.down).weight[:, channels[0]] = 0
    return model


def _forget_in_norms(block: torch.nn.Module, lost: list[int], heads: Any) -> None:
    """x / sqrt(mean over those that stay of x^2 + eps) as a norm over all, with zeros where heads are gone."""
    for name, width in (("q", heads.num_query // heads.groups * heads.head_dim), ("k", heads.head_dim)):
        norm: Any = block.get_submodule(f"self_attn.{name}_norm")
        for head in lost:
            for parameter in block.get_submodule(f"self_attn.{name}_proj").parameters():
                parameter[head * width : (head + 1) * width] = 0
        share = 1 - len(lost) * width / len(norm.weight)
        norm.weight.mul_(share**0.5)
        norm.variance_epsilon *= share


def _close(router: Any, lost: list[int]) -> None:
    """Give experts no chance: their logits are minus infinity."""
    usual = torch.nn.functional.linear

    def closed(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = usual(hidden, weight)
        logits[:, lost] = -torch.inf
        return logits

    forward = router.forward

    def forward_closed(hidden: Tensor) -> Any:
        torch.nn.functional.linear = closed
        try:
            return forward(hidden)
        finally:
            torch.nn.functional.linear = usual

    router.forward = forward_closed


def no_progress(num_tokens: int) -> None:
    """Progress that nobody reads."""
