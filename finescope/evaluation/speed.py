"""How fast models are beside each other: measured in turns, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from finescope.evaluation.memory import TensorMemory, parameter_bytes
from finescope.runners.base import Progress


@dataclass(frozen=True)
class Shape:
    """What a round reads and makes."""

    documents: int
    prompt_tokens: int  # of each
    decode_tokens: int  # of each, beside the first, which reading the prompt makes


class Round(NamedTuple):
    """Seconds of one prefill and of the decoding after it: by the clock, and CPU time over all threads of the process."""

    prefill: float
    decode: float
    prefill_cpu: float
    decode_cpu: float


@dataclass(frozen=True)
class Throughput:
    """One model's figures."""

    prefill: float  # tokens a second over the whole batch, by the clock: the median of the rounds
    decode: float
    peak_bytes: int  # weights and, at the most, what a round adds to them: cache, activations, logits
    rounds: tuple[Round, ...]


@torch.no_grad()
def throughputs(models: Mapping[str, PreTrainedModel], shape: Shape, repeats: int, progress: Progress) -> dict[str, Throughput]:
    """Measure prefill and greedy decoding of models in eval mode on one device, in turns: one round of each, `repeats` times.

    All read the same prompts of random tokens. A first round of each warms up and is where memory is measured; `progress` is
    told of each round, `(repeats + 1) * len(models)` in all.
    """
    assert not any(model.training for model in models.values())
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (shape.documents, shape.prompt_tokens), generator=generator)
    peaks: dict[str, int] = {}
    for name, model in models.items():
        with TensorMemory() as memory:
            _round(model, prompt, shape.decode_tokens)
        peaks[name] = parameter_bytes(model) + memory.peak_bytes
        progress(1)
    rounds: dict[str, list[Round]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            rounds[name].append(_round(model, prompt, shape.decode_tokens))
            progress(1)
    return {name: _throughput(rounds[name], shape, peaks[name]) for name in models}


def gain_over_flops(base: tuple[float, int], student: tuple[float, int]) -> float | None:
    """Share of the FLOPs saved that is seen in speed: (speed / base speed - 1) / (base FLOPs / FLOPs - 1).

    Each argument is tokens a second and FLOPs of the same work. At 1 the student is faster by as much as it computes less; None
    where it computes no less.
    """
    saved = base[1] / student[1] - 1
    return (student[0] / base[0] - 1) / saved if saved > 0 else None


def _throughput(rounds: list[Round], shape: Shape, peak_bytes: int) -> Throughput:
    prefill, decode = (statistics.median(getattr(one, name) for one in rounds) for name in ("prefill", "decode"))
    documents = shape.documents
    return Throughput(
        documents * shape.prompt_tokens / prefill, documents * shape.decode_tokens / decode, peak_bytes, tuple(rounds)
    )


def _round(model: PreTrainedModel, prompt: torch.Tensor, decode_tokens: int) -> Round:
    """One prefill of `prompt` int64 [B, T] and decoding after it."""
    prompt, cache = prompt.to(model.device), DynamicCache(config=model.config)
    start = _now(model)
    output = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1)  # [B, 1]
    middle = _now(model)
    for _ in range(decode_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(dim=-1)
    end = _now(model)
    return Round(middle[0] - start[0], end[0] - middle[0], middle[1] - start[1], end[1] - middle[1])


def _now(model: PreTrainedModel) -> tuple[float, float]:
    """Seconds of the clock and of CPU time, once the device has done all that was asked of it."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter(), time.process_time()
