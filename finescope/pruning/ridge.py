"""Ridge least squares of a linear map that writes into the residual stream."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finescope.errors import StepFailed
from finescope.models.anatomy import linear_map

DAMPING = 0.1  # ridge of a channel, in units of its own second moment; the best of a study on SmolLM2-135M
FLOOR = 1e-8  # ridge of a channel, in units of the mean second moment: keeps silent channels solvable
# Below this share of a norm's mean squared gain an output of the map is held to what it was: nothing of it passes the norm.
_GAIN_FLOOR = 1e-3


class Refit(NamedTuple):
    """What one re-fit gained on the calibration tokens."""

    name: str  # module path of the linear map, or of the experts
    error_before: float  # squared error over the target's squared norm, with the original weights
    error_after: float  # the same with the re-fitted weights
    experts_left_out: int | None = None  # those that keep their weights: they had fewer tokens than channels


class Moments:
    """Second moments of a linear map's inputs, and of its inputs with its residual error, summed in float64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, residual: Tensor) -> None:
        """Take in tokens: inputs [tokens, in] and what is missing from the map's output for them [tokens, out], float32.

        One batch's product is made in float32, for half the time of float64 and the same solution; sums over batches are float64.
        """
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ residual

    def change(self, name: str) -> Tensor:
        """What to add to the map's weight: float64 [in, out].

        Raises:
            StepFailed: the activations at `name` are not finite.
        """
        if not (self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise StepFailed(f"compensation: the activations at {name} are not finite")
        return ridge(self.gram, self.cross)


def ridge(gram: Tensor, cross: Tensor) -> Tensor:
    """The change dW that minimises ||R - X dW||^2 + sum_j ridge_j ||dW_j||^2, ridge_j = 0.1 of channel j's own X'X + a floor.

    gram: X'X [in, in] float64; cross: X'R [in, out] float64, R the error of the original weights. Returns [in, out].
    """
    moments = gram.diagonal()
    floor = (FLOOR * moments.mean()).clamp_min(torch.finfo(gram.dtype).tiny)
    # In place: of a wide map each copy of the matrix is gigabytes.
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * moments + floor)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))


class OutputMap:
    """A linear map of a block whose output is added to the residual stream, as it is or through a norm of its own."""

    def __init__(self, block: nn.Module, name: str, norm: str | None) -> None:
        self.module = linear_map(block, name)
        self.norm = block.get_submodule(norm) if norm else None
        weight = self.module.weight.detach()
        self.weight = weight.T if isinstance(self.module, Conv1D) else weight  # [out, in], the module's own memory

    def run(self, inputs: Tensor) -> Tensor:
        """What is added to the stream for inputs [..., in], in the model's dtype."""
        output = self.module(inputs)
        return output if self.norm is None else self.norm(output)

    def outputs(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The map's own output and what is added to the stream, in float32, for inputs float32 [tokens, in]."""
        bias = None if self.module.bias is None else self.module.bias.float()
        output = nn.functional.linear(inputs, self.weight.float(), bias)
        return output, output if self.norm is None else self.norm(output)

    def add_to(self, moments: Moments, inputs: Tensor, target: Tensor) -> float:
        """Give tokens to `moments`, as a problem that is linear in the weight; returns the squared error of the present weight.

        inputs: [tokens, in]; target: what should be added to the stream for them [tokens, out].
        """
        inputs = inputs.float()
        output, added = self.outputs(inputs)
        residual = target.float() - added
        if self.norm is not None:
            # gain * y / rms(y), linear in y where rms(y) stays what it is.
            inputs = inputs / output.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(torch.finfo(output.dtype).tiny)
        moments.add(inputs, residual)
        return float(residual.double().square().sum())

    def error(self, inputs: Tensor, target: Tensor) -> float:
        """The squared error of the present weight; the arguments are those of `add_to`."""
        _, added = self.outputs(inputs.float())
        return float((target.float() - added).double().square().sum())

    def change(self, moments: Moments, name: str) -> Tensor:
        """What to add to the weight: float64 [out, in].

        Raises:
            StepFailed: the activations at `name` are not finite.
        """
        change = moments.change(name)
        if self.norm is not None:
            # An RMS norm's gain, whatever it calls it, is what it makes of ones.
            gain = self.norm(torch.ones(1, change.shape[1], device=change.device))[0].double()
            change = change * gain / (gain.square() + _GAIN_FLOOR * gain.square().mean())
        return change.T
