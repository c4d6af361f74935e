"""Random models of every known family, small enough to run in milliseconds."""

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from finescope.config import ModelSection
from finescope.models.load import ModelReference, materialise
from finescope.models.source import resolve

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def tiny_model(family: str, *, num_layers: int = 4, seed: int = 0, **settings: object) -> PreTrainedModel:
    """d_model 16, 4 query heads, 2 key/value heads, MLP width 24, 64 tokens; large weights, so that layers differ."""
    name = _CLASSES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        num_hidden_layers=num_layers,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=64,
        initializer_range=0.3,
        **settings,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def saved_model(directory: Path, family: str, **settings: object) -> Path:
    """A tiny model in a stock directory (no tokenizer)."""
    tiny_model(family, **settings).save_pretrained(directory)
    return directory


def reference(directory: Path, **section: object) -> ModelReference:
    """A reference to the model in `directory`, in float32."""
    model = ModelSection.model_validate({"path": str(directory), "dtype": "float32", **section})
    return materialise(resolve(model), model, str(directory / "unused"))
