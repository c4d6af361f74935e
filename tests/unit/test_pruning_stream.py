import pytest
import torch
from pruning_models import FAMILIES, batches_of, tiny_model

from finescope.models.anatomy import anatomy_of, blocks_of, linear
from finescope.pruning.stream import attention_inputs, block_pass, mlp_inputs, open_stream

BATCHES = batches_of(((9, 6, 2), (7, 7), (1,)))


def sliding(family):
    """Two kinds of mask in one model, where the family has them."""
    if family == "mistral":
        return {"sliding_window": 3}
    return {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1} if family.startswith("qwen") else {}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_model(family, windows, attention):
    model = tiny_model(family, **(sliding(family) if windows else {}))
    model.set_attn_implementation(attention)
    anatomy = anatomy_of(model)
    with torch.no_grad():
        whole = [model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states for ids, mask in BATCHES]
    stream = open_stream(model, anatomy, BATCHES)
    for layer, block in enumerate(blocks_of(model, anatomy)):
        for index in range(len(BATCHES)):
            assert torch.equal(stream.hidden[index], whole[index][layer])
            arguments = stream.arguments[layer][index]
            middle, stream.hidden[index] = block_pass(block, anatomy, stream.hidden[index], arguments)
            same_middle, inputs = mlp_inputs(block, anatomy, whole[index][layer], arguments)
            assert torch.equal(middle, same_middle)
            assert torch.equal(stream.hidden[index], middle + linear(block, anatomy.down)(inputs))
            heads = attention_inputs(block, anatomy, whole[index][layer], arguments)
            assert torch.equal(middle, whole[index][layer] + linear(block, anatomy.output)(heads))
    norm = model.get_submodule(anatomy.final_norm)
    for hidden, states in zip(stream.hidden, whole, strict=True):
        assert torch.equal(norm(hidden), states[-1])


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    block = blocks_of(model, anatomy_of(model))[0]
    stream = open_stream(model, anatomy_of(model), BATCHES)
    assert "forward" not in vars(block)
    mlp_inputs(block, anatomy_of(model), stream.hidden[0], stream.arguments[0][0])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())
