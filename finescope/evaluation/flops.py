"""Floating-point operations of a token, by the weights that multiply it and the tokens that it attends to."""

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from finescope.models.anatomy import Anatomy, anatomy_of, blocks_of, has_experts, input_width, linear_map, linears_of


class Flops(NamedTuple):
    """Two a weight, and two a product of attention: a product and a sum. Norms, embeddings and softmax are not counted."""

    blocks: int  # of the blocks' linear maps; of a mixture of experts as many experts as a token uses, and the router
    head: int  # of the output embedding
    attention: int  # of a token and one that it attends to: queries with keys and weights with values, in all blocks

    @property
    def token(self) -> int:
        """Of a token whose next one is predicted, as in decoding, without attention, which grows with what was read."""
        return self.blocks + self.head

    def prefill(self, tokens: int) -> int:
        """Of reading a prompt of `tokens`, of which the last alone predicts; each attends to itself and to all before it."""
        return tokens * self.blocks + self.head + tokens * (tokens + 1) // 2 * self.attention


def flops_of(model: PreTrainedModel) -> Flops:
    """The operations of one token; the weights of `model` may be on the meta device."""
    anatomy, head = anatomy_of(model), model.get_output_embeddings()
    assert isinstance(head, nn.Linear), "a causal language model has output embeddings"
    blocks = blocks_of(model, anatomy)
    weights = sum(_block_weights(model, block, anatomy) for block in blocks)
    heads = sum(input_width(linear_map(block, anatomy.output)) for block in blocks)  # query heads, times their dimension
    return Flops(2 * weights, 2 * head.weight.numel(), 4 * heads)


def _block_weights(model: PreTrainedModel, block: nn.Module, anatomy: Anatomy) -> int:
    weights = sum(linear_map(block, name).weight.numel() for name in linears_of(block, anatomy))
    if has_experts(block, anatomy):
        of_experts = [block.get_parameter(f"{anatomy.experts}.{name}_proj") for name in ("gate_up", "down")]
        used = int(model.config.num_experts_per_tok)
        weights += (
            sum(used * weight[0].numel() for weight in of_experts) + block.get_parameter(f"{anatomy.mlp}.gate.weight").numel()
        )
    return weights
