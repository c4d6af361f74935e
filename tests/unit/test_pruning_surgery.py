import pytest
import torch
from pruning_models import FAMILIES, MIXTURES, VOCABULARY, WITH_HEADS, batches_of, cut, kept_of, layout, masked, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralForCausalLM

from finescope.errors import ModelError
from finescope.models.anatomy import anatomy_of, blocks_of

(IDS, MASK), *_ = batches_of(((12, 9, 5),))
# Eight groups of three query heads; three groups stay, and nine heads do not divide 48.
WIDE = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 4}


def logits(model, ids=IDS, mask=MASK, **arguments):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **arguments).logits


def of_blocks(model):
    return [value for block in blocks_of(model, anatomy_of(model)) for value in block.parameters()]


def assert_same(student, model, kept):
    """On a batch with padding, on one token, and with a cache token by token."""
    dense = masked(model, kept)
    torch.testing.assert_close(logits(student), logits(dense), rtol=1e-4, atol=1e-5)
    one = IDS[:1, :1]
    torch.testing.assert_close(logits(student, one, MASK[:1, :1]), logits(dense, one, MASK[:1, :1]), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        cache = student(input_ids=IDS[:1, :7], use_cache=True).past_key_values
        stepped = [student(input_ids=IDS[:1, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(7, 12)]
    torch.testing.assert_close(torch.cat(stepped, dim=1), logits(dense)[:1, 7:], rtol=1e-4, atol=1e-5)


KINDS = [
    *((family, {"mlp": 16 if family in MIXTURES else 15}) for family in FAMILIES),
    *((family, {"heads": 2}) for family in WITH_HEADS),
    *((family, {"experts": 3}) for family in MIXTURES),
    *((family, {"heads": 1, "mlp": 8, "experts": 2}) for family in MIXTURES),
]


@pytest.mark.parametrize(("family", "counts"), KINDS)
def test_logits_equal_those_of_the_masked_dense_model(family, counts):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = kept_of(model, **counts)
    student = cut(model, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(student) is type(model)  # two and four heads divide 48
    assert_same(student, model, kept)
    for before, after in zip(layout(model).groups, layout(student).groups, strict=True):
        # What is left of a single key/value head are its two query heads.
        left = counts.get(before.kind, before.number)
        assert after.number == (2 if before.kind == "heads" and left == 1 else left)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_or_not(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    kept = kept_of(model, heads=2, mlp=16)
    student = cut(model, kept)
    torch.testing.assert_close(logits(student), logits(masked(model, kept)), rtol=1e-4, atol=1e-5)
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    assert student.generation_config.temperature == 0.7
    assert student.generation_config is not model.generation_config


@pytest.mark.parametrize(
    ("family", "biases"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        *((family, {"attention_bias": True}) for family in ("gemma2", "olmo2", "qwen3_moe")),
        ("gpt_neox", {"attention_bias": False}),
    ],
)
def test_biases(family, biases):
    model = tiny_model(family, **biases)
    kept = kept_of(model, heads=2, mlp=16)
    student = cut(model, kept)
    if family != "gpt_neox":
        assert blocks_of(student, anatomy_of(student))[0].self_attn.q_proj.bias.shape == (32,)
    assert_same(student, model, kept)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi3", "mixtral"])
def test_multi_query(family):
    # Of six query heads on one key/value head three stay: other ones in every layer.
    model = tiny_model(family, num_key_value_heads=1)
    kept = kept_of(model, heads=3)
    student = cut(model, kept)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (3, 1)
    if family != "olmo2":  # its key norm stays whole, which `masked` does not know
        assert_same(student, model, kept)


def test_llama_head_count_that_divides_stays_llama():
    # Nine query heads of 8 on three key/value heads in d_model 72, as SmolLM2's nine of 64 in 576: six divide 72.
    model = tiny_model("llama", hidden_size=72, num_attention_heads=9)
    kept = kept_of(model, heads=2)
    student = cut(model, kept)
    assert type(student) is LlamaForCausalLM
    assert student.config.num_attention_heads == 6
    torch.testing.assert_close(logits(student), logits(masked(model, kept)), rtol=1e-4, atol=1e-5)


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
    wide = tiny_model("llama", rope_parameters=rope, **WIDE)
    kept = kept_of(wide, heads=3, mlp=20)
    student = cut(wide, kept)
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
    wide = tiny_model("llama", **WIDE)
    student = cut(wide, kept_of(wide, heads=3, mlp=20))
    config = LlamaConfig(**(student.config.to_dict() | {"num_attention_heads": 12, "num_key_value_heads": 3}))
    config.__dict__["num_attention_heads"] = 9  # past the check that refuses it
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(student.state_dict())
    assert torch.equal(logits(llama), logits(student))


@pytest.mark.parametrize("family", [name for name in WITH_HEADS if not name.startswith(("llama", "gemma"))])
def test_other_families_take_any_head_count(family, tmp_path):
    model = tiny_model(family, **WIDE)
    kept = kept_of(model, heads=3, mlp=16)
    student = cut(model, kept)
    assert_same(student, model, kept)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(student))


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_is_kept_and_blocks_share_nothing(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    student = cut(model, kept_of(model, heads=2, mlp=16, experts=3))
    assert {value.dtype for value in student.state_dict().values()} == {torch.bfloat16}
    assert student.dtype == student.config.dtype == torch.bfloat16
    ours, theirs = ({value.untyped_storage().data_ptr() for value in of_blocks(owner)} for owner in (model, student))
    assert not ours & theirs
    assert not student.training


def test_code_of_others_is_refused():
    class Foreign(LlamaForCausalLM):
        pass

    model = Foreign(tiny_model("llama").config)
    with pytest.raises(ModelError, match="not a class of transformers"):
        cut(model, kept_of(model, heads=2))
