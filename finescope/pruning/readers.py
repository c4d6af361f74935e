"""Compensation of the maps that read the stream: they are turned to what the dense model's would have read."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy, has_experts
from finescope.pruning.ridge import Moments, Refit

# Tokens for each dimension of the stream: with fewer the fit is left out. With five it was of no use on other documents.
_TOKENS_PER_DIMENSION = 16


class ReaderFit:
    """The least-squares map from what a sublayer of the pruned model reads to what the dense model's reads.

    All maps of the sublayer (query, key and value; gate and up; router and experts) read one vector x, the normed stream. Ridge
    regression finds A so that x + x A is nearest to the dense model's x; a weight W becomes W (I + A)', whatever its outputs.
    That is the ridge solution for each of them towards its own output in the dense model, at the cost of one.
    """

    def __init__(self, name: str, d_model: int, device: torch.device) -> None:
        self._name, self._moments = name, Moments(d_model, d_model, device)
        self._before = self._scale = 0.0
        self._tokens = 0

    def add(self, pruned: Tensor, dense: Tensor) -> None:
        """Take in what the same tokens are in both models: [tokens, d_model] each."""
        pruned, dense = pruned.float(), dense.float()
        missing = dense - pruned
        self._moments.add(pruned, missing)
        self._before += float(missing.double().square().sum())
        self._scale += float(dense.double().square().sum())
        self._tokens += len(pruned)

    @torch.no_grad()
    def apply(self, weights: Iterable[Tensor]) -> list[Refit]:
        """Turn the weights [..., out, d_model] in place; nothing, and no record, where nothing is missing or tokens are too few.

        Raises:
            StepFailed: the activations or a new weight are not finite.
        """
        gram, cross = self._moments.gram, self._moments.cross
        if not self._before or self._tokens < _TOKENS_PER_DIMENSION * len(gram):
            return []
        change = self._moments.change(self._name)  # [d_model, d_model]
        for weight in weights:
            weight.copy_(weight.double() + weight.double() @ change.T)
            if not weight.isfinite().all():
                raise StepFailed(f"compensation: a re-fitted weight of {self._name} is not finite in {weight.dtype}")
        after = self._before - float((change * (2 * cross - gram @ change)).sum())
        return [Refit(self._name, self._before / self._scale, after / self._scale)]


def attention_readers(block: nn.Module, anatomy: Anatomy) -> Iterator[Tensor]:
    """The weights that read the stream for the attention: [out, d_model], each the module's own memory."""
    return (_weight(block, name) for name in anatomy.qkv)


def mlp_readers(block: nn.Module, anatomy: Anatomy) -> Iterator[Tensor]:
    """The same of the MLP, or of the router and all experts: [..., out, d_model]."""
    if has_experts(block, anatomy):
        names = (f"{anatomy.router}.weight", f"{anatomy.experts}.gate_up_proj")
        return (block.get_parameter(name).detach() for name in names)
    return (_weight(block, name) for name in anatomy.expand)


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_parameter(f"{name}.weight").detach()
    return weight.T if isinstance(block.get_submodule(name), Conv1D) else weight
