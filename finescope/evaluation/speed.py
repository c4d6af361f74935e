"""What a smaller model is worth: tokens a second, bytes on disk, bytes in memory."""

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from finescope import storage


@dataclass(frozen=True)
class Throughput:
    """Tokens a second over the whole batch: one figure a repeat, and their medians."""

    prefill: float  # median of prefill_repeats
    decode: float  # median of decode_repeats
    prefill_repeats: tuple[float, ...]
    decode_repeats: tuple[float, ...]


@torch.no_grad()
def throughput(model: PreTrainedModel, batch_size: int, prompt_tokens: int, decode_tokens: int, repeats: int) -> Throughput:
    """Measure prefill and greedy decoding on one batch of `batch_size` prompts of random tokens, the same each time.

    Prefill reads the prompts and makes the first next token; decoding makes `decode_tokens` more, one at a time, from
    the cache. One round before the first that counts warms up. To compare two models, run them in turns on one machine.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator).to(model.device)
    was_training = model.training
    model.eval()
    rounds = [_round(model, prompt, decode_tokens) for _ in range(repeats + 1)][1:]
    model.train(was_training)
    prefill = tuple(batch_size * prompt_tokens / seconds for seconds, _ in rounds)
    decode = tuple(batch_size * decode_tokens / seconds for _, seconds in rounds)
    return Throughput(statistics.median(prefill), statistics.median(decode), prefill, decode)


def weight_bytes(directory: str) -> int:
    """Bytes of the safetensors files of a model's directory."""
    return sum(info.size or 0 for info in storage.glob(directory) if info.path.endswith(".safetensors"))


def parameter_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters as they lie in memory; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _round(model: PreTrainedModel, prompt: torch.Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill of `prompt` int64 [B, T] and of decoding after it."""
    cache = DynamicCache(config=model.config)
    start = _now(model)
    output = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1)  # [B, 1]
    prefilled = _now(model)
    for _ in range(decode_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(dim=-1)
    return prefilled - start, _now(model) - prefilled


def _now(model: PreTrainedModel) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
