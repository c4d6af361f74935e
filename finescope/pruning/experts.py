"""Compensation of a mixture of experts: the down map of each expert, re-fitted on the tokens that are sent to it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy
from finescope.pruning.ridge import Moments, Refit
from finescope.pruning.stream import Stream, mlp_arguments


@torch.no_grad()
def refit_experts(
    block: nn.Module, anatomy: Anatomy, stream: Stream, layer: int, dense: list[Tensor], chosen: list[Tensor]
) -> Refit:
    """Re-fit the experts' down maps towards the dense stream after the block, and move the pruned stream past the block.

    The experts of a token answer for one residual together, so they are fitted one after the other, each on what those before it
    have left (a sweep of block coordinate descent): all at once would correct the same error as often as a token has experts.
    An expert with fewer tokens than channels keeps its weights: the fit would only learn those tokens by heart.

    Raises:
        StepFailed: the activations or the new weights are not finite.
    """
    assert anatomy.experts is not None
    assert anatomy.mlp_norm is None
    experts, name = Experts(block.get_submodule(anatomy.experts)), f"{anatomy.blocks}.{layer}.{anatomy.experts}"
    calls: list[tuple[Tensor, ...]] = []
    targets: list[Tensor] = []
    for index, hidden, call in stream.at(layer):
        middle, arguments = mlp_arguments(block, anatomy, hidden, call)
        stream.hidden[index] = middle.cpu()
        calls.append(arguments)
        here = chosen[index].to(stream.device)
        missing = dense[index].to(stream.device).float() - middle.float()
        targets.append((missing * here[:, :, None]).flatten(end_dim=1))  # what is not chosen has neither target nor error
    masks = [mask.reshape(-1).to(target.device) for mask, target in zip(chosen, targets, strict=True)]

    def residuals() -> list[Tensor]:
        """What is missing from the experts' output, float32 [documents * tokens, d_model] a batch, 0 where not chosen."""
        outputs = [experts.run(arguments) * mask[:, None] for arguments, mask in zip(calls, masks, strict=True)]
        return [target - output for target, output in zip(targets, outputs, strict=True)]

    original, residual = experts.down.clone(), residuals()
    before, scale = _squares(residual), _squares(targets) or 1.0
    left_out = sum(not experts.refit(expert, calls, masks, residual, name) for expert in range(len(experts.down)))
    if not experts.down.isfinite().all():
        raise StepFailed(f"compensation: the re-fitted weights of {name} are not finite in {experts.down.dtype}")
    after = _squares(residuals())
    if after > before:
        experts.down.copy_(original)
    for index, arguments in enumerate(calls):
        hidden = stream.hidden[index]
        stream.hidden[index] = hidden + experts.module(*arguments).reshape(hidden.shape).cpu()
    return Refit(name, before / scale, min(after, before) / scale, left_out)


class Experts:
    """The experts of a block: gate_up_proj [experts, 2 * channels, d_model], down_proj [experts, d_model, channels]."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.gate_up, self.down = module.get_parameter("gate_up_proj").detach(), module.get_parameter("down_proj").detach()

    def run(self, arguments: tuple[Tensor, ...]) -> Tensor:
        """Their output, weights applied: float32 [documents * tokens, d_model]."""
        return self.module(*arguments).float()

    def refit(self, expert: int, calls: list[tuple[Tensor, ...]], masks: list[Tensor], residual: list[Tensor], name: str) -> bool:
        """Re-fit one expert and take what it corrects from `residual`; False where it has too few tokens."""
        _, outputs, channels = self.down.shape
        if (
            sum(int(((chosen == expert).any(dim=1) & mask).sum()) for (_, chosen, _), mask in zip(calls, masks, strict=True))
            < channels
        ):
            return False
        moments = Moments(channels, outputs, self.down.device)
        for index, tokens, inputs in self.inputs(expert, calls, masks):
            moments.add(inputs, residual[index][tokens])
        change = moments.change(name)
        self.down[expert].copy_(self.down[expert].double() + change.T)
        for index, tokens, inputs in self.inputs(expert, calls, masks):
            residual[index][tokens] -= inputs @ change.float()
        return True

    def inputs(self, expert: int, calls: list[tuple[Tensor, ...]], masks: list[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """By batch: the tokens that are sent to an expert, and the inputs of its down map, times the expert's weight there."""
        for index, ((hidden, chosen, weights), mask) in enumerate(zip(calls, masks, strict=True)):
            tokens, slots = torch.nonzero((chosen == expert) & mask[:, None], as_tuple=True)
            gate, up = nn.functional.linear(hidden[tokens].float(), self.gate_up[expert].float()).chunk(2, dim=-1)
            yield index, tokens, self.module.act_fn(gate) * up * weights[tokens, slots, None].float()


def _squares(parts: list[Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in parts)
