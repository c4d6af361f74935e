"""Floating-point operations of a token, by the weights that multiply it."""

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from finescope.models.anatomy import Anatomy, anatomy_of, blocks_of, has_experts, linear_map, linears_of


class Flops(NamedTuple):
    """Two a weight: a product and a sum. Norms, embeddings, and what attention multiplies beside its weights, are not counted."""

    blocks: int  # of the blocks' linear maps; of a mixture of experts as many experts as a token uses, and the router
    head: int  # of the output embedding

    @property
    def token(self) -> int:
        """Of a token whose next one is predicted, as in decoding."""
        return self.blocks + self.head

    def prefill(self, tokens: int) -> int:
        """Of reading a prompt of `tokens`, of which the last alone predicts."""
        return tokens * self.blocks + self.head


def flops_of(model: PreTrainedModel) -> Flops:
    """The operations of one token; the weights of `model` may be on the meta device."""
    anatomy, head = anatomy_of(model), model.get_output_embeddings()
    assert isinstance(head, nn.Linear), "a causal language model has output embeddings"
    weights = sum(_block_weights(model, block, anatomy) for block in blocks_of(model, anatomy))
    return Flops(2 * weights, 2 * head.weight.numel())


def _block_weights(model: PreTrainedModel, block: nn.Module, anatomy: Anatomy) -> int:
    weights = sum(linear_map(block, name).weight.numel() for name in linears_of(block, anatomy))
    if has_experts(block, anatomy):
        of_experts = [block.get_parameter(f"{anatomy.experts}.{name}_proj") for name in ("gate_up", "down")]
        used = int(model.config.num_experts_per_tok)
        weights += (
            sum(used * weight[0].numel() for weight in of_experts) + block.get_parameter(f"{anatomy.mlp}.gate.weight").numel()
        )
    return weights
