"""Random dictionaries and the models that they are of, for tests of what is measured of them."""

import torch
import transformers
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from finescope.models.hooks import HookPoint
from finescope.sae.autoencoder import Architecture, SparseAutoencoder, fold
from finescope.sae.dictionary import Dictionary


def random_autoencoder(
    architecture: Architecture = "topk",
    *,
    num_latents: int = 24,
    coordinates: tuple[int, ...] = (1, 3, 4, 9, 10, 15),
    basis: Tensor | None = None,
    d_in: int = 16,
    seed: int = 0,
) -> SparseAutoencoder:
    """k 4; mean and scale are those of no set in particular."""
    generator = torch.Generator().manual_seed(seed)
    size = len(coordinates) if basis is None else len(basis)
    decoder = torch.nn.functional.normalize(torch.randn(num_latents, size, generator=generator), dim=1)
    weights = fold(
        decoder + 0.2 * torch.randn(num_latents, size, generator=generator),
        0.1 * torch.randn(num_latents, generator=generator),
        decoder,
        torch.zeros(size),
        torch.randn(size, generator=generator),
        torch.rand(size, generator=generator) + 0.5,
    )
    weights |= {"coordinates": torch.tensor(coordinates), "threshold": 0.3 * torch.rand(num_latents, generator=generator)}
    if architecture in ("topk", "relu_l1"):
        del weights["threshold"]
    if basis is not None:
        weights["basis"] = basis
    return SparseAutoencoder(weights, architecture=architecture, k=4, d_in=d_in)


def dictionary_of(autoencoder: SparseAutoencoder, hook: HookPoint) -> Dictionary:
    return Dictionary(autoencoder, hook, "random", "tiny", None, None, "", None)


def model_of(family: str) -> PreTrainedModel:
    """d_model 16, 4 blocks, 64 tokens; of gpt2, positions are learned; gemma2 caps its logits, here so low that it shows."""
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32, "vocab_size": 64, "initializer_range": 0.3}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    if family == "gemma2":
        sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
        sizes |= {"intermediate_size": 24, "vocab_size": 64, "initializer_range": 0.3, "final_logit_softcapping": 0.5}
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).eval()
    return tiny_model(family)
