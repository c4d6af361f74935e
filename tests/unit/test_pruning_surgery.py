import numpy as np
import pytest
import torch
from pruning_models import FAMILIES, VOCABULARY, batches_of, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM

from finescope.errors import ModelError
from finescope.models.anatomy import anatomy_of, blocks_of, linear
from finescope.pruning.allocation import Kept
from finescope.pruning.groups import groups_of
from finescope.pruning.surgery import cut, student_config

(IDS, MASK), *_ = batches_of(((12, 9, 5),))
ODD = Kept([np.array([0, 2]), np.array([1, 2]), np.array([0, 1])], [np.arange(shift, 40, 2) for shift in (0, 1, 0)])


def pruned(model, kept):
    return cut(model, anatomy_of(model), groups_of(model, anatomy_of(model)), kept)


def masked(model, kept):
    """The dense model with zeros where the output maps read what was removed: the same function as the pruned one."""
    anatomy = anatomy_of(model)
    groups = groups_of(model, anatomy)
    width = groups.queries_per_kv * groups.head_dim
    for layer, block in enumerate(blocks_of(model, anatomy)):
        for head in set(range(groups.num_kv_heads)) - set(kept.heads[layer].tolist()):
            linear(block, anatomy.output).weight.data[:, head * width : (head + 1) * width] = 0
        gone = sorted(set(range(groups.num_channels)) - set(kept.mlp[layer].tolist()))
        linear(block, anatomy.down).weight.data[:, gone] = 0
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_masked_dense_model(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = pruned(model, ODD)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(student), logits(masked(model, ODD)), rtol=1e-4, atol=1e-5)
    assert type(student) is type(model)  # four heads divide 48
    assert (student.config.num_attention_heads, student.config.num_key_value_heads, student.config.head_dim) == (4, 2, 8)
    assert student.config.intermediate_size == 20
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert student.generation_config.temperature == 0.7
    assert student.generation_config is not model.generation_config


def test_biases_of_every_map():
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    student = pruned(model, ODD)
    assert blocks_of(student, anatomy_of(student))[0].self_attn.q_proj.bias.shape == (32,)
    torch.testing.assert_close(logits(student), logits(masked(model, ODD)), rtol=1e-4, atol=1e-5)


def test_llama_head_count_that_divides_stays_llama():
    # Nine query heads of 8 on three key/value heads in d_model 72, as SmolLM2's nine of 64 in 576: six divide 72.
    model = tiny_model("llama", hidden_size=72, num_attention_heads=9)
    student = pruned(model, ODD)
    assert type(student) is LlamaForCausalLM
    assert student.config.num_attention_heads == 6
    torch.testing.assert_close(logits(student), logits(masked(model, ODD)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e4},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
)
def test_llama_head_count_that_does_not_divide_becomes_mistral(tmp_path, rope):
    # Eight groups of three query heads; three groups stay, and nine heads do not divide 48.
    wide = tiny_model("llama", num_attention_heads=24, num_key_value_heads=8, head_dim=4, rope_parameters=rope)
    kept = ODD._replace(heads=[np.array([0, 2, 7])] * 3)
    student = pruned(wide, kept)
    assert type(student) is MistralForCausalLM
    assert student.config.sliding_window is None
    assert student.config.head_dim == 4
    assert student.config.rope_parameters == wide.config.rope_parameters
    assert student.config.vocab_size == VOCABULARY
    assert (student.config.bos_token_id, student.config.eos_token_id, student.config.pad_token_id) == (1, 2, 0)
    torch.testing.assert_close(logits(student), logits(masked(wide, kept)), rtol=1e-4, atol=1e-5)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(MistralForCausalLM.from_pretrained(tmp_path)), logits(student))


def test_mistral_computes_what_llama_computes_to_the_last_bit():
    wide = tiny_model("llama", num_attention_heads=24, num_key_value_heads=8, head_dim=4)
    student = pruned(wide, ODD._replace(heads=[np.array([0, 2, 7])] * 3))
    config = LlamaConfig(**(student.config.to_dict() | {"num_attention_heads": 12, "num_key_value_heads": 3}))
    config.__dict__["num_attention_heads"] = 9  # past the check that refuses it
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(student.state_dict())
    assert torch.equal(logits(llama), logits(student))


def test_llama_with_biases_and_such_a_head_count_is_refused():
    wide = tiny_model("llama", num_attention_heads=24, num_key_value_heads=8, head_dim=4, attention_bias=True)
    with pytest.raises(ModelError, match=r"9 heads: they do not divide hidden_size 48"):
        student_config(wide.config, groups_of(wide, anatomy_of(wide)), 3, 16)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_take_any_head_count(family, tmp_path):
    model = tiny_model(family, num_attention_heads=24, num_key_value_heads=8, head_dim=4)
    kept = ODD._replace(heads=[np.array([0, 2, 7])] * 3)
    student = pruned(model, kept)
    torch.testing.assert_close(logits(student), logits(masked(model, kept)), rtol=1e-4, atol=1e-5)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(student))


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_is_kept_and_nothing_is_shared(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    student = pruned(model, ODD)
    assert {value.dtype for value in student.state_dict().values()} == {torch.bfloat16}
    assert student.dtype == student.config.dtype == torch.bfloat16
    addresses = {value.untyped_storage().data_ptr() for value in model.parameters()}
    assert not addresses & {value.untyped_storage().data_ptr() for value in student.parameters()}
    assert not student.training


def test_code_of_others_is_refused():
    class Foreign(LlamaForCausalLM):
        pass

    model = Foreign(tiny_model("llama").config)
    with pytest.raises(ModelError, match="not a class of transformers"):
        pruned(model, ODD)
