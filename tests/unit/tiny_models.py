"""Random models of every known family, small enough to run in milliseconds."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from finescope.config import ModelSection
from finescope.models.load import ModelReference, materialise
from finescope.models.source import resolve

# Windows shorter than the sequences, and layers of both types among the first two.
_WINDOW = {"sliding_window": 3}
_EXPERTS = {"num_experts_per_tok": 2}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": _WINDOW,
    "gemma3_text": {**_WINDOW, "sliding_window_pattern": 2},
    "phi3": {},
    "olmo2": {},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    # The third block is dense.
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 12, "mlp_only_layers": [2]},
}
FAMILIES = tuple(_SETTINGS)
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
}
# What a family's configuration does not know: it has no grouped queries, or derives the size of a head.
_WITHOUT = {
    "phi3": ("head_dim",),
    "gpt_neox": ("head_dim", "num_key_value_heads"),
    "gpt2": ("head_dim", "num_key_value_heads", "intermediate_size"),
}
_GPT2_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
}


def tiny_config(family: str, *, num_layers: int = 4, **settings: object) -> Any:
    """d_model 16, 4 query heads, 2 key/value heads (where there are), MLP width 24 (GPT-2: 64, four times d_model), 64 tokens."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": num_layers,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    sizes = {key: value for key, value in sizes.items() if key not in _WITHOUT.get(family, ())}
    sizes |= _SETTINGS[family] | settings
    if family == "gpt2":
        sizes = {_GPT2_NAMES.get(key, key): value for key, value in sizes.items()}
    name = "Gemma3Text" if family == "gemma3_text" else _CLASSES[family]
    return getattr(transformers, f"{name}Config")(**sizes)


def tiny_model(family: str, *, num_layers: int = 4, seed: int = 0, **settings: object) -> PreTrainedModel:
    """A model of `tiny_config` with large weights, so that layers differ; biases and norms are random too."""
    config = tiny_config(family, num_layers=num_layers, **settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{_CLASSES[family]}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def saved_model(directory: Path, family: str, **settings: object) -> Path:
    """A tiny model in a stock directory (no tokenizer)."""
    tiny_model(family, **settings).save_pretrained(directory)
    return directory


def saved_multimodal_model(directory: Path) -> Path:
    """A Gemma 3 with a vision tower around the text model of `tiny_config("gemma3_text")`."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=tiny_config("gemma3_text"),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=63,
        boi_token_index=62,
        eoi_token_index=61,
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    return directory


def reference(directory: Path, **section: object) -> ModelReference:
    """A reference to the model in `directory`, in float32."""
    model = ModelSection.model_validate({"path": str(directory), "dtype": "float32", **section})
    return materialise(resolve(model, "model.path"), model, str(directory / "unused"))
