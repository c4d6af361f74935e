"""Compensation: the kept output weights are re-fitted so that the pruned stream follows the dense one.

A relative of ZipLM (arXiv 2302.04089) and SlimGPT: ridge least squares, layer by layer, on activations of the prefix that is
already pruned. The target corrects the residual: what is missing from the pruned stream to the dense model's.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy, blocks_of, has_experts, input_width, linear_map
from finescope.pruning.experts import refit_experts
from finescope.pruning.importance import Batch, Progress
from finescope.pruning.ridge import Moments, OutputMap, Refit
from finescope.pruning.stream import Stream, attention_inputs, block_pass, mlp_arguments, open_stream


def compensate(
    model: PreTrainedModel,
    student: PreTrainedModel,
    anatomy: Anatomy,
    origins: Sequence[int],
    batches: Sequence[Batch],
    progress: Progress,
) -> list[Refit]:
    """Re-fit `student` in place, block by block: the down maps always, the attention's output map where there are fewer heads.

    `origins` are the blocks of `model` that those of the student were, 0-based. Each is fitted to the dense stream after the
    block that it was, so that the first after a gap makes up for the blocks that have left; the last makes up for those after it.

    In memory at a time, for all calibration tokens: three hidden states, and the inputs of one map or, of experts, three hidden
    states more. Padding and position 0 (the attention sink, whose norm would outweigh all others) are left out of the fit.
    `progress` sums to the tokens once.

    Raises:
        StepFailed: no document has two tokens, or activations or weights are not finite.
    """
    chosen = [_chosen(mask) for _, mask in batches]
    if not sum(int(mask.sum()) for mask in chosen):
        raise StepFailed("compensation: no calibration document has two tokens")
    num_tokens = sum(int(mask.sum()) for _, mask in batches)
    dense, pruned = open_stream(model, anatomy, batches), open_stream(student, anatomy, batches)
    blocks, student_blocks = blocks_of(model, anatomy), blocks_of(student, anatomy)
    ends = (*(origin + 1 for origin in origins[:-1]), len(blocks))  # where the dense stream is that a block is fitted to
    refits: list[Refit] = []
    for layer, (origin, end) in enumerate(zip(origins, ends, strict=True)):
        block, student_block = blocks[origin], student_blocks[layer]
        for gone in range(ends[layer - 1] if layer else 0, origin):
            _advance(blocks[gone], anatomy, dense, gone, keep_middle=False)
        fewer_heads = _heads_width(block, anatomy) > _heads_width(student_block, anatomy)
        middle = _advance(block, anatomy, dense, origin, fewer_heads)
        for gone in range(origin + 1, end):
            _advance(blocks[gone], anatomy, dense, gone, keep_middle=False)
        if fewer_heads:
            refits.append(_refit_attention(student_block, anatomy, pruned, layer, middle, chosen))
        refit_mlp = refit_experts if has_experts(student_block, anatomy) else _refit_mlp
        refits.append(refit_mlp(student_block, anatomy, pruned, layer, dense.hidden, chosen))
        progress(num_tokens * (layer + 1) // len(origins) - num_tokens * layer // len(origins))
    return refits


@torch.no_grad()
def _advance(block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, keep_middle: bool) -> list[Tensor]:
    """Move a stream past a block; the stream after the attention is returned where it is needed."""
    middle: list[Tensor] = []
    for index, call in enumerate(stream.calls[layer]):
        between, stream.hidden[index] = block_pass(block, anatomy, stream.hidden[index], call)
        if keep_middle:
            middle.append(between)
    return middle


@torch.no_grad()
def _refit_attention(
    block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, dense: list[Tensor], chosen: list[Tensor]
) -> Refit:
    """Re-fit the output map towards the dense stream after the attention."""
    pairs = zip(stream.hidden, stream.calls[layer], strict=True)
    inputs = [attention_inputs(block, anatomy, hidden, call) for hidden, call in pairs]
    output = OutputMap(block, anatomy.output, anatomy.attention_norm)
    return _refit(output, Tokens(inputs, stream.hidden, dense, chosen), f"{anatomy.blocks}.{layer}.{anatomy.output}")


@torch.no_grad()
def _refit_mlp(
    block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, dense: list[Tensor], chosen: list[Tensor]
) -> Refit:
    """Re-fit the down map towards the dense stream after the block, and move the pruned stream past the block."""
    channels = []
    for index, call in enumerate(stream.calls[layer]):
        stream.hidden[index], (inputs,) = mlp_arguments(block, anatomy, stream.hidden[index], call)
        channels.append(inputs)
    down = OutputMap(block, anatomy.down, anatomy.mlp_norm)
    refit = _refit(down, Tokens(channels, stream.hidden, dense, chosen), f"{anatomy.blocks}.{layer}.{anatomy.down}")
    for index, inputs in enumerate(channels):
        stream.hidden[index] = stream.hidden[index] + down.run(inputs)
    return refit


class Tokens(NamedTuple):
    """What a map is fitted on, a batch each."""

    inputs: list[Tensor]  # of the map: [documents, tokens, in]
    before: list[Tensor]  # the pruned stream without the map's output: [documents, tokens, d_model]
    dense: list[Tensor]  # the dense stream with it
    chosen: list[Tensor]  # bool [documents, tokens]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The chosen tokens of each batch: the map's inputs [tokens, in], what it should add to the stream [tokens, d_model]."""
        for inputs, before, dense, mask in zip(*self, strict=True):
            here = mask.to(inputs.device)
            yield inputs[here], dense[here].float() - before[here].float()


def _refit(output: OutputMap, tokens: Tokens, name: str) -> Refit:
    """Set the map's weight to the ridge solution; its bias stays. A solution that is no better on the same tokens is not taken.

    Raises:
        StepFailed: the activations or the new weight are not finite.
    """
    moments = Moments(output.weight.shape[1], output.weight.shape[0], output.weight.device)
    before = scale = 0.0
    for inputs, target in tokens.batches():
        before += output.add_to(moments, inputs, target)
        scale += float(target.double().square().sum())
    original = output.weight.clone()
    output.weight.copy_(original.double() + output.change(moments, name))
    if not output.weight.isfinite().all():
        raise StepFailed(f"compensation: the re-fitted weight of {name} is not finite in {output.weight.dtype}")
    after = sum(output.error(inputs, target) for inputs, target in tokens.batches())
    if after > before:
        output.weight.copy_(original)
    return Refit(name, before / (scale or 1.0), min(after, before) / (scale or 1.0))


def _heads_width(block: nn.Module, anatomy: Anatomy) -> int:
    return input_width(linear_map(block, anatomy.output))


def _chosen(mask: Tensor) -> Tensor:
    """Tokens of the fit: neither padding nor position 0; int64 to bool, [documents, tokens]."""
    assert bool((mask[:, :1] == 1).all()), "documents are padded on the right and hold a token"
    chosen = mask.bool().clone()
    chosen[:, 0] = False
    return chosen
