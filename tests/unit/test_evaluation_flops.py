import pytest
import torch
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from finescope.evaluation.flops import flops_of

_DENSE = ("llama", "phi3", "gemma2", "gpt_neox", "gpt2")


def test_a_llama_by_hand() -> None:
    # d_model 16, 4 query and 2 key/value heads of 4, MLP 24, 64 words, 4 blocks.
    flops = flops_of(tiny_model("llama", tie_word_embeddings=True))
    attention, mlp = 16 * 16 + 2 * 16 * 8 + 16 * 16, 3 * 16 * 24
    assert flops == (2 * 4 * (attention + mlp), 2 * 16 * 64, 4 * 4 * 16)
    assert flops.token == flops.blocks + flops.head
    assert flops.prefill(3) == 3 * flops.blocks + flops.head + (1 + 2 + 3) * flops.attention


@pytest.mark.parametrize("family", _DENSE)
def test_as_torch_counts_products_with_weights(family: str) -> None:
    model = tiny_model(family)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=False, logits_to_keep=1)
    counted = counter.get_flop_counts()["Global"]
    with_weights = sum(count for operation, count in counted.items() if operation in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert flops_of(model)._replace(attention=0).prefill(7) == with_weights


def test_a_mixture_multiplies_the_experts_that_a_token_uses() -> None:
    # As the dense Llama but for its MLP: two of four experts of width 24, and a router of four rows.
    flops = flops_of(tiny_model("mixtral"))
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16
    assert flops.blocks == 2 * 4 * (attention + 2 * 3 * 16 * 24 + 4 * 16)
