"""Compensation: the kept output weights are re-fitted so that the pruned stream follows the dense one.

A relative of ZipLM (arXiv 2302.04089) and SlimGPT: ridge least squares, layer by layer, on activations of the prefix that is
already pruned. The target corrects the residual: what is missing from the pruned stream to the dense model's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy, blocks_of, linear
from finescope.pruning.importance import Batch, Progress
from finescope.pruning.stream import Stream, attention_inputs, block_pass, mlp_inputs, open_stream

DAMPING = 0.1  # ridge of a channel, in units of its own second moment; the best of a study on SmolLM2-135M
FLOOR = 1e-8  # ridge of a channel, in units of the mean second moment: keeps silent channels solvable


class Refit(NamedTuple):
    """What one re-fit gained on the calibration tokens."""

    name: str  # module path of the linear map
    error_before: float  # squared error over the target's squared norm, with the original weights
    error_after: float  # the same with the re-fitted weights


class Moments:
    """Second moments of a linear map's inputs, and of its inputs with its residual error, summed in float64."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        count, device = module.in_features, module.weight.device
        self.gram = torch.zeros(count, count, dtype=torch.float64, device=device)
        self.cross = torch.zeros(count, module.out_features, dtype=torch.float64, device=device)
        self.error = 0.0
        self.target = 0.0

    @torch.no_grad()
    def add(self, inputs: Tensor, target: Tensor) -> None:
        """Take in tokens: inputs [tokens, in] and what the map should have added to the stream for them [tokens, out].

        One batch's product is made in float32, for half the time of float64 and the same solution; sums over batches are float64.
        """
        inputs, target = inputs.float(), target.float()
        residual = target - nn.functional.linear(inputs, self.module.weight.float(), _float(self.module.bias))
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ residual
        self.error += float(residual.double().square().sum())
        self.target += float(target.double().square().sum())

    def refit(self, name: str) -> Refit:
        """Set the map's weight to the ridge solution; its bias stays.

        Raises:
            StepFailed: the activations or the new weight are not finite.
        """
        if not (self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise StepFailed(f"compensation: the activations at {name} are not finite")
        change = ridge(self.gram, self.cross)  # [in, out]
        gain = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        with torch.no_grad():
            self.module.weight.copy_(self.module.weight.double() + change.T)
        if not self.module.weight.isfinite().all():
            raise StepFailed(f"compensation: the re-fitted weight of {name} is not finite in {self.module.weight.dtype}")
        scale = self.target or 1.0
        return Refit(name, self.error / scale, (self.error - float(gain)) / scale)


def ridge(gram: Tensor, cross: Tensor) -> Tensor:
    """The change dW that minimises ||R - X dW||^2 + sum_j ridge_j ||dW_j||^2, ridge_j = 0.1 of channel j's own X'X + a floor.

    gram: X'X [in, in] float64; cross: X'R [in, out] float64, R the error of the original weights. Returns [in, out].
    """
    moments = gram.diagonal()
    floor = (FLOOR * moments.mean()).clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram + torch.diag(DAMPING * moments + floor)))


def compensate(
    model: PreTrainedModel, student: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Batch], progress: Progress
) -> list[Refit]:
    """Re-fit `student` in place, block by block: down_proj always, o_proj where the student has fewer heads.

    In memory at a time, for all calibration tokens: three hidden states and one block's kept channels. Padding and position 0
    (the attention sink, whose norm would outweigh all others) are left out of the fit. `progress` sums to the tokens once.

    Raises:
        StepFailed: no document has two tokens, or activations or weights are not finite.
    """
    chosen = [_chosen(mask) for _, mask in batches]
    if not sum(int(mask.sum()) for mask in chosen):
        raise StepFailed("compensation: no calibration document has two tokens")
    num_tokens = sum(int(mask.sum()) for _, mask in batches)
    dense, pruned = open_stream(model, anatomy, batches), open_stream(student, anatomy, batches)
    pairs = list(zip(blocks_of(model, anatomy), blocks_of(student, anatomy), strict=True))
    refits: list[Refit] = []
    for layer, (block, student_block) in enumerate(pairs):
        fewer_heads = linear(block, anatomy.output).in_features > linear(student_block, anatomy.output).in_features
        middle = _advance(block, anatomy, dense, layer, fewer_heads)
        if fewer_heads:
            refits.append(_refit_attention(student_block, anatomy, pruned, layer, middle, chosen))
        refits.append(_refit_mlp(student_block, anatomy, pruned, layer, dense.hidden, chosen))
        progress(num_tokens * (layer + 1) // len(pairs) - num_tokens * layer // len(pairs))
    return refits


@torch.no_grad()
def _advance(block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, keep_middle: bool) -> list[Tensor]:
    """Move a stream past a block; the stream after the attention is returned where it is needed."""
    middle: list[Tensor] = []
    for index, arguments in enumerate(stream.arguments[layer]):
        between, stream.hidden[index] = block_pass(block, anatomy, stream.hidden[index], arguments)
        if keep_middle:
            middle.append(between)
    return middle


@torch.no_grad()
def _refit_attention(
    block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, dense: list[Tensor], chosen: list[Tensor]
) -> Refit:
    """Re-fit o_proj towards the dense stream after the attention."""
    moments = Moments(linear(block, anatomy.output))
    for hidden, arguments, target, mask in zip(stream.hidden, stream.arguments[layer], dense, chosen, strict=True):
        inputs = attention_inputs(block, anatomy, hidden, arguments)
        here = mask.to(hidden.device)
        moments.add(inputs[here], target[here].float() - hidden[here].float())
    return moments.refit(f"{anatomy.blocks}.{layer}.{anatomy.output}")


@torch.no_grad()
def _refit_mlp(
    block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, dense: list[Tensor], chosen: list[Tensor]
) -> Refit:
    """Re-fit down_proj towards the dense stream after the block, and move the pruned stream past the block."""
    down, channels = linear(block, anatomy.down), []
    moments = Moments(down)
    for index, (arguments, target, mask) in enumerate(zip(stream.arguments[layer], dense, chosen, strict=True)):
        middle, inputs = mlp_inputs(block, anatomy, stream.hidden[index], arguments)
        here = mask.to(middle.device)
        moments.add(inputs[here], target[here].float() - middle[here].float())
        stream.hidden[index] = middle
        channels.append(inputs)
    refit = moments.refit(f"{anatomy.blocks}.{layer}.{anatomy.down}")
    for index, inputs in enumerate(channels):
        stream.hidden[index] = stream.hidden[index] + down(inputs)
    return refit


def _chosen(mask: Tensor) -> Tensor:
    """Tokens of the fit: neither padding nor position 0; int64 to bool, [documents, tokens]."""
    assert bool((mask[:, :1] == 1).all()), "documents are padded on the right and hold a token"
    chosen = mask.bool().clone()
    chosen[:, 0] = False
    return chosen


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
