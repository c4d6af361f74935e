"""Where activations are read: the residual stream after a decoder block."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finescope.models.anatomy import anatomy_of, blocks_of


Site = Literal["residual", "attention", "mlp", "mlp_hidden"]


@dataclass(frozen=True)
class HookPoint:
    """A place in the model."""

    layer: int  # 1-based: after decoder block `layer`
    site: Site = "residual"

    @property
    def module(self) -> str:
        """Path of the module whose output it is, the same in all families that are known."""
        return f"model.layers.{self.layer - 1}"


def capture(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """The residual stream after block `layer`, before the final norm; the head is never run.

    Load the model with `num_layers=layer`: blocks after it are run for nothing.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 where there is a token, padded on either side.

    Returns:
        [B, T, d_model] in the model's dtype; what stands at padding means nothing.
    """
    with torch.no_grad():
        return _residual(model, layer, {"input_ids": input_ids, "attention_mask": attention_mask})


def residual_of_embeddings(model: PreTrainedModel, embeddings: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
    """`capture` as a differentiable function of the input embeddings [B, T, d_model]."""
    return _residual(model, layer, {"inputs_embeds": embeddings, "attention_mask": attention_mask})


def _residual(model: PreTrainedModel, layer: int, inputs: dict[str, Tensor]) -> Tensor:
    block = blocks_of(model, anatomy_of(model))[layer - 1]
    caught: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(keep)
    try:
        model.base_model(**inputs, use_cache=False)
    finally:
        handle.remove()
    assert len(caught) == 1, "the block ran more than once"
    return caught[0]
