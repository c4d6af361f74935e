"""Tiny random models of every family, and calibration batches, for the tests of pruning."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = tuple(CLASSES)
VOCABULARY = 61


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """d_model 48, 3 blocks, 6 query heads on 3 key/value heads of 8, 40 channels; biases and norms are random too."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config_class, model_class = CLASSES[family]
    model = model_class(config_class(**(sizes | changes))).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.update(do_sample=True, temperature=0.7)
    return model


def batches_of(lengths: tuple[tuple[int, ...], ...], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """One batch a tuple of document lengths, padded on the right with a token that is not the padding token's id."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for batch in lengths:
        mask = (torch.arange(max(batch))[None] < torch.tensor(batch)[:, None]).long()
        ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
        batches.append((torch.where(mask.bool(), ids, torch.tensor(7)), mask))
    return batches


def no_progress(num_tokens: int) -> None:
    """Progress that nobody reads."""
