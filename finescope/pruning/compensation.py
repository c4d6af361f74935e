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
from finescope.models.anatomy import Anatomy, has_experts, input_width, linear_map
from finescope.pruning.experts import refit_experts
from finescope.pruning.ridge import Moments, OutputMap, Refit
from finescope.pruning.stream import Batch, Stream, attention_inputs, block_pass, fitted_tokens, mlp_arguments, open_stream


class Compensation:
    """Re-fits a student's blocks from the first to the last: the down maps always, the output map where there are fewer heads.

    In memory at a time, for all calibration tokens: three hidden states, and the inputs of one map or, of experts, three hidden
    states more. Padding and position 0 (the attention sink, whose norm would outweigh all others) are left out of the fit.
    """

    def __init__(self, model: PreTrainedModel, student: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Batch]) -> None:
        """Begin at the embeddings; the weights of both models' blocks may be on the meta device.

        Raises:
            StepFailed: no document has two tokens.
        """
        self._anatomy, self._chosen = anatomy, fitted_tokens(batches)
        if not sum(int(mask.sum()) for mask in self._chosen):
            raise StepFailed("compensation: no calibration document has two tokens")
        self._dense, self._pruned = open_stream(model, anatomy, batches), open_stream(student, anatomy, batches)

    def refit(self, layer: int, block: nn.Module, student_block: nn.Module) -> list[Refit]:
        """Re-fit the student's block towards the dense one and move both streams past them.

        Raises:
            StepFailed: activations or weights are not finite.
        """
        anatomy, chosen, refits = self._anatomy, self._chosen, list[Refit]()
        fewer_heads = _heads_width(block, anatomy) > _heads_width(student_block, anatomy)
        middle = _advance(block, anatomy, self._dense, layer, fewer_heads)
        if fewer_heads:
            refits.append(_refit_attention(student_block, anatomy, self._pruned, layer, middle, chosen))
        refit_mlp = refit_experts if has_experts(student_block, anatomy) else _refit_mlp
        refits.append(refit_mlp(student_block, anatomy, self._pruned, layer, self._dense.hidden, chosen))
        return refits


@torch.no_grad()
def _advance(block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, keep_middle: bool) -> list[Tensor]:
    """Move a stream past a block; the stream after the attention is returned where it is needed."""
    middle: list[Tensor] = []
    for index, hidden, call in stream.at(layer):
        between, after = block_pass(block, anatomy, hidden, call)
        stream.hidden[index] = after.cpu()
        if keep_middle:
            middle.append(between.cpu())
    return middle


@torch.no_grad()
def _refit_attention(
    block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, dense: list[Tensor], chosen: list[Tensor]
) -> Refit:
    """Re-fit the output map towards the dense stream after the attention."""
    inputs = [attention_inputs(block, anatomy, hidden, call).cpu() for _, hidden, call in stream.at(layer)]
    output = OutputMap(block, anatomy.output, anatomy.attention_norm)
    return _refit(output, Tokens(inputs, stream.hidden, dense, chosen), f"{anatomy.blocks}.{layer}.{anatomy.output}")


@torch.no_grad()
def _refit_mlp(
    block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, dense: list[Tensor], chosen: list[Tensor]
) -> Refit:
    """Re-fit the down map towards the dense stream after the block, and move the pruned stream past the block."""
    channels = []
    for index, hidden, call in stream.at(layer):
        middle, (inputs,) = mlp_arguments(block, anatomy, hidden, call)
        stream.hidden[index] = middle.cpu()
        channels.append(inputs.cpu())
    down = OutputMap(block, anatomy.down, anatomy.mlp_norm)
    refit = _refit(down, Tokens(channels, stream.hidden, dense, chosen), f"{anatomy.blocks}.{layer}.{anatomy.down}")
    for index, inputs in enumerate(channels):
        stream.hidden[index] = stream.hidden[index] + down.run(inputs.to(stream.device)).cpu()
    return refit


class Tokens(NamedTuple):
    """What a map is fitted on, a batch each, on the CPU."""

    inputs: list[Tensor]  # of the map: [documents, tokens, in]
    before: list[Tensor]  # the pruned stream without the map's output: [documents, tokens, d_model]
    dense: list[Tensor]  # the dense stream with it
    chosen: list[Tensor]  # bool [documents, tokens]

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The chosen tokens of each batch: the map's inputs [tokens, in], what it should add to the stream [tokens, d_model]."""
        for inputs, before, dense, mask in zip(*self, strict=True):
            yield inputs[mask].to(device), dense[mask].to(device).float() - before[mask].to(device).float()


def _refit(output: OutputMap, tokens: Tokens, name: str) -> Refit:
    """Set the map's weight to the ridge solution; its bias stays. A solution that is no better on the same tokens is not taken.

    Raises:
        StepFailed: the activations or the new weight are not finite.
    """
    device = output.weight.device
    moments = Moments(output.weight.shape[1], output.weight.shape[0], device)
    before = scale = 0.0
    for inputs, target in tokens.batches(device):
        before += output.add_to(moments, inputs, target)
        scale += float(target.double().square().sum())
    original = output.weight.clone()
    output.weight.copy_(original.double() + output.change(moments, name))
    if not output.weight.isfinite().all():
        raise StepFailed(f"compensation: the re-fitted weight of {name} is not finite in {output.weight.dtype}")
    after = sum(output.error(inputs, target) for inputs, target in tokens.batches(device))
    if after > before:
        output.weight.copy_(original)
    return Refit(name, before / (scale or 1.0), min(after, before) / (scale or 1.0))


def _heads_width(block: nn.Module, anatomy: Anatomy) -> int:
    return input_width(linear_map(block, anatomy.output))
