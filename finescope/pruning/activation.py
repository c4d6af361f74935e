"""Importance from what the maps that write into the stream are given: activation (Minitron) and WIFV (FLAP)."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy, has_experts
from finescope.models.blocks import Blocks
from finescope.models.groups import Layout
from finescope.pruning.experts import Experts
from finescope.pruning.importance import Importance, group_sums, importance_of
from finescope.pruning.ridge import OutputMap
from finescope.pruning.stream import Batch, Portions, Progress, fitted_tokens, open_stream, output_inputs

Measure = Literal["activation", "wifv"]


def activation_importance(
    source: Blocks, layout: Layout, measure: Measure, batches: Sequence[Batch], progress: Progress
) -> Importance:
    """Each group's share of what all groups of its kind do in its block, so that kinds and blocks are in one unit.

    activation: the root mean square over tokens of a channel, or of a head's output (Minitron, arXiv 2407.14679, section 3.1).
    wifv: the variance over tokens of each input of the output map, times the squared norm of the weights that read it, summed
    over the group (FLAP, arXiv 2312.11983, equation 5). An expert has the sum of its channels; they count with the expert's
    weight. Padding and position 0 (the attention sink, which would outweigh all others) are left out.

    One pass forward. `progress` sums to the tokens once.

    Raises:
        StepFailed: no document has two tokens, or the importance is not finite.
    """
    chosen = fitted_tokens(batches)
    if not sum(int(mask.sum()) for mask in chosen):
        raise StepFailed("importance: no calibration document has two tokens")
    portions = Portions(sum(int(mask.sum()) for _, mask in batches), layout.num_layers, progress)
    stream, sums = open_stream(source.model, source.anatomy, batches), group_sums(layout, source.model.device)
    tokens: dict[int, Tensor] = {}
    for layer in range(layout.num_layers):
        with source.block(layer) as block, torch.no_grad():
            measured = _Block(block, source.anatomy)
            for index, hidden, call in stream.at(layer):
                here = chosen[index].to(stream.device)
                attention, mlp, after = output_inputs(block, source.anatomy, hidden, call)
                measured.take(attention, mlp, here)
                stream.hidden[index] = after.cpu()
            for kind, values in measured.groups(layout.heads.groups, measure):
                if any(groups.kind == kind and layer in groups.layers for groups in layout.groups):
                    which, position = layout.find(kind, layer)
                    sums[which][position] = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
            if measured.experts is not None:
                tokens[layer] = measured.routed
        portions.done(1)
    return importance_of(sums, layout, source, tokens)


class _Columns:
    """Sums over tokens of the inputs of a map and of their squares: float64, shape [..., in]."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self.first = torch.zeros(shape, dtype=torch.float64, device=device)
        self.second = torch.zeros_like(self.first)
        self.tokens = 0

    def measured(self, weight: Tensor, measure: Measure) -> Tensor:
        """Mean square, or variance times the squared norm of `weight` [..., out, in] that reads it: float64 [..., in]."""
        mean_square = self.second / self.tokens
        if measure == "activation":
            return mean_square
        variance = mean_square - (self.first / self.tokens).square()
        return variance.clamp_min(0.0) * weight.double().square().sum(dim=-2)


class _Block:
    """What goes into the two maps of one block that write into the stream."""

    def __init__(self, block: nn.Module, anatomy: Anatomy) -> None:
        self._output = OutputMap(block, anatomy.output, None).weight
        self.experts = Experts(block.get_submodule(anatomy.experts or "")) if has_experts(block, anatomy) else None
        if self.experts is None:
            down = OutputMap(block, anatomy.down, None).weight
            self._down, channels = down[None], (1, down.shape[1])
        else:
            self._down, channels = self.experts.down, (len(self.experts.down), self.experts.down.shape[2])
        self._attention = _Columns(self._output.shape[1], device=self._output.device)
        self._mlp = _Columns(*channels, device=self._output.device)
        self.routed = torch.zeros(channels[0], dtype=torch.int64, device=self._output.device)  # tokens each expert got

    def take(self, attention: Tensor, mlp: tuple[Tensor, ...], here: Tensor) -> None:
        """Take in a batch; attention: [documents, tokens, in], mlp as in `output_inputs`, here: bool [documents, tokens]."""
        _add(self._attention.first, self._attention.second, attention[here])
        for expert, inputs in self._channels(mlp, here):
            _add(self._mlp.first[expert], self._mlp.second[expert], inputs)
            self.routed[expert] += len(inputs)
        self._attention.tokens += int(here.sum())
        self._mlp.tokens = self._attention.tokens

    def _channels(self, mlp: tuple[Tensor, ...], here: Tensor) -> Iterator[tuple[int, Tensor]]:
        if self.experts is None:
            yield 0, mlp[0][here]
            return
        for expert in range(len(self.experts.down)):
            for _, _, inputs in self.experts.inputs(expert, [mlp], [here.reshape(-1)]):
                yield expert, inputs

    def groups(self, heads: int, measure: Measure) -> Iterator[tuple[Literal["heads", "mlp", "experts"], Tensor]]:
        """By kind: float64 [rows, number]."""
        by_head = self._attention.measured(self._output, measure).reshape(heads, -1).sum(dim=-1)
        channels = self._mlp.measured(self._down, measure)
        if measure == "activation":
            by_head, channels = by_head.sqrt(), channels.sqrt()
        yield "heads", by_head[None]
        yield "mlp", channels
        if self.experts is not None:
            yield "experts", channels.sum(dim=-1)[None]


def _add(first: Tensor, second: Tensor, inputs: Tensor) -> None:
    """Add to both sums; inputs: [tokens, in]."""
    inputs = inputs.double()
    first += inputs.sum(dim=0)
    second += inputs.square().sum(dim=0)
