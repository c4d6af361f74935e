"""Compensation: the kept weights are re-fitted so that the pruned stream follows the dense one.

A relative of ZipLM (arXiv 2302.04089) and SlimGPT: ridge least squares, layer by layer, on activations of the prefix that is
already pruned. The target of a map that writes into the stream corrects the residual: what is missing from the pruned stream to
the dense model's. Maps that read the stream are turned to what they would have read (`readers.py`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy, has_experts
from finescope.models.blocks import Blocks
from finescope.pruning.experts import refit_experts
from finescope.pruning.readers import ReaderFit, attention_readers, mlp_readers
from finescope.pruning.ridge import Moments, OutputMap, Refit
from finescope.pruning.stream import (
    Batch,
    Stream,
    advance,
    fitted_tokens,
    input_of,
    mlp_arguments,
    open_stream,
    passage,
)


class Compensation:
    """Re-fits a student's blocks from the first to the last, each along the way of a token: attention, then MLP.

    The target of a block is what the dense block that it is made of reads, and the stream after that. So the first one after
    whole blocks that have left makes up for them; where the last ones have left, the student's last block does, as its target is
    the stream after them all.

    In memory at a time, for all calibration tokens: five hidden states, and the inputs of one map or, of experts, three hidden
    states more. Padding and position 0 (the attention sink, whose norm would outweigh all others) are left out of the fit.
    """

    def __init__(self, source: Blocks, origins: Sequence[int], student: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Begin at the embeddings; the weights of the student's blocks may be on the meta device.

        origins: the blocks of `source` that the student's are made of, 0-based, ascending.

        Raises:
            StepFailed: no document has two tokens.
        """
        self._source, self._anatomy, self._origins, self._chosen = source, source.anatomy, origins, fitted_tokens(batches)
        if not sum(int(mask.sum()) for mask in self._chosen):
            raise StepFailed("compensation: no calibration document has two tokens")
        self._dense = open_stream(source.model, source.anatomy, batches)
        self._pruned = open_stream(student, source.anatomy, batches)
        self._skip(range(origins[0]))

    def follow(self, layer: int, dense: nn.Module) -> None:
        """Move the dense stream past the dense block that the student's block `layer` is made of, and note the way."""
        self._way = _advance(dense, self._anatomy, self._dense, self._origins[layer])

    def refit(self, layer: int, block: nn.Module) -> list[Refit]:
        """Re-fit the student's block to what `follow` noted, and move both streams to the next.

        Raises:
            StepFailed: activations or weights are not finite.
        """
        anatomy, pruned, chosen = self._anatomy, self._pruned, self._chosen
        attention_reads, between, mlp_reads = self._way
        last = layer + 1 == len(self._origins)
        if last:
            self._skip(range(self._origins[layer] + 1, len(self._dense.calls)))
        refit_mlp = refit_experts if has_experts(block, anatomy) else _refit_mlp
        refits = [
            *self._refit_readers(layer, block, anatomy.qkv[0], attention_reads, attention_readers(block, anatomy)),
            _refit_attention(block, anatomy, pruned, layer, between, chosen),
            *self._refit_readers(layer, block, anatomy.mlp, mlp_reads, mlp_readers(block, anatomy)),
            refit_mlp(block, anatomy, pruned, layer, self._dense.hidden, chosen),
        ]
        if not last:
            self._skip(range(self._origins[layer] + 1, self._origins[layer + 1]))
        return refits

    def _skip(self, removed: Iterable[int]) -> None:
        """Move the dense stream past blocks that the student lacks."""
        for layer in removed:
            with self._source.block(layer) as block:
                advance(block, self._dense, layer)

    @torch.no_grad()
    def _refit_readers(
        self, layer: int, block: nn.Module, module: str, dense: list[Tensor], weights: Iterable[Tensor]
    ) -> list[Refit]:
        """Turn the weights that read the input of `module` towards what that is in the dense model."""
        device = self._pruned.device
        fit = ReaderFit(f"{self._anatomy.blocks}.{layer}.{module} reads", dense[0].shape[-1], device)
        for index, hidden, call in self._pruned.at(layer):
            here = self._chosen[index]
            fit.add(input_of(module, block, hidden, call)[here.to(device)], dense[index][here].to(device))
        return fit.apply(weights)


@torch.no_grad()
def _advance(block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Move the dense stream past a block. By batch: what its attention reads, the stream between, what its MLP reads."""
    ways = []
    for index, hidden, call in stream.at(layer):
        way = passage(block, anatomy, hidden, call)
        stream.hidden[index] = way.after.cpu()
        ways.append((way.attention_reads.cpu(), way.between.cpu(), way.mlp_reads.cpu()))
    attention_reads, between, mlp_reads = map(list, zip(*ways, strict=True))
    return attention_reads, between, mlp_reads


@torch.no_grad()
def _refit_attention(
    block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, dense: list[Tensor], chosen: list[Tensor]
) -> Refit:
    """Re-fit the output map towards the dense stream after the attention."""
    inputs = [input_of(anatomy.output, block, hidden, call).cpu() for _, hidden, call in stream.at(layer)]
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
