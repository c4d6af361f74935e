import pytest
import torch
from pruning_models import FAMILIES, batches_of, tiny_model

from finescope.models.anatomy import anatomy_of, blocks_of, has_experts
from finescope.pruning.ridge import OutputMap
from finescope.pruning.stream import input_of, mlp_arguments, open_stream, output_inputs, passage

BATCHES = batches_of(((9, 6, 2), (7, 7), (1,)))


def sliding(family):
    """Two kinds of mask in one model, where the family has them and not anyway."""
    if family == "mistral":
        return {"sliding_window": 3}
    return {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1} if family in ("qwen2", "qwen3") else {}


def close(one, other):
    """Equal but for the order of sums."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


CASES = [(family, False, "eager" if family == "gemma2" else "sdpa") for family in FAMILIES]  # it has no other
CASES += [(family, True, "sdpa") for family in ("mistral", "qwen2")]
CASES += [(family, False, "eager") for family in ("llama", "gpt2")]


@pytest.mark.parametrize(("family", "windows", "attention"), CASES)
def test_block_by_block_equals_the_model(family, windows, attention):
    model = tiny_model(family, **(sliding(family) if windows else {}))
    model.set_attn_implementation(attention)
    anatomy = anatomy_of(model)
    with torch.no_grad():
        outputs = [model(input_ids=i, attention_mask=m, output_hidden_states=True, use_cache=False) for i, m in BATCHES]
    whole = [output.hidden_states for output in outputs]
    stream = open_stream(model, anatomy, BATCHES)
    for layer, block in enumerate(blocks_of(model, anatomy)):
        for index in range(len(BATCHES)):
            assert torch.equal(stream.hidden[index], whole[index][layer])
            call = stream.calls[layer][index]
            attention_reads, middle, mlp_reads, stream.hidden[index] = passage(block, anatomy, stream.hidden[index], call)
            same_middle, arguments = mlp_arguments(block, anatomy, whole[index][layer], call)
            assert torch.equal(middle, same_middle)
            assert torch.equal(attention_reads, input_of(anatomy.qkv[-1], block, whole[index][layer], call))
            assert torch.equal(mlp_reads, input_of(anatomy.mlp, block, whole[index][layer], call))
            heads, same_arguments, after = output_inputs(block, anatomy, whole[index][layer], call)
            assert torch.equal(after, stream.hidden[index])
            assert all(torch.equal(one, other) for one, other in zip(arguments, same_arguments, strict=True))
            with torch.no_grad():
                if has_experts(block, anatomy):
                    added = block.get_submodule(anatomy.experts)(*arguments).reshape(middle.shape)
                else:
                    added = OutputMap(block, anatomy.down, anatomy.mlp_norm).run(arguments[0])
                close(stream.hidden[index], middle + added)
                assert torch.equal(heads, input_of(anatomy.output, block, whole[index][layer], call))
                close(middle, whole[index][layer] + OutputMap(block, anatomy.output, anatomy.attention_norm).run(heads))
    norm = model.get_submodule(anatomy.final_norm)
    for hidden, states in zip(stream.hidden, whole, strict=True):
        assert torch.equal(norm(hidden), states[-1])


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    block = blocks_of(model, anatomy_of(model))[0]
    stream = open_stream(model, anatomy_of(model), BATCHES)
    assert "forward" not in vars(block)
    mlp_arguments(block, anatomy_of(model), stream.hidden[0], stream.calls[0][0])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())
