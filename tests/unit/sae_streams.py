"""Streams of activations in memory, and small sections to train on them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finescope.config import SaeSection
from finescope.sae.fit import FitPlan, FitResult, fit
from finescope.sae.stream import ActivationStream

WIDTH = 16


def section(**settings: Any) -> SaeSection:
    """32 latents on 16 coordinates, 6,000 activations eight times over."""
    base: dict[str, Any] = {
        "num_latents": 32,
        "k": 3,
        "num_tokens": 6000,
        "batch_tokens": 200,
        "buffer_mib": 1,
        "epochs": 8,
        "learning_rate": 5e-3,
        "dead_after_tokens": 2000,
        "auxk": 8,
    }
    return SaeSection.model_validate(base | settings)


def buffer_of(rows: int, width: int = WIDTH) -> float:
    """`buffer_mib` of so many activations."""
    return rows * width * 4 / 2**20


def planted(count: int, latents: int = 24, active: int = 2, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Sparse positive sums of random unit directions: activations [count, width] and the directions [latents, width]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(latents, width, generator=generator), dim=1)
    ids = torch.rand(count, latents, generator=generator).topk(active).indices
    values = 1 + torch.rand(count, active, generator=generator)
    return torch.zeros(count, latents).scatter_(1, ids, values) @ directions, directions


def stream_of(chunks: Sequence[Tensor]) -> ActivationStream:
    """Chunks in memory as a stream."""
    return lambda start, stop, step: (chunks[number].numpy() for number in range(start, stop, step))


def plan_of(
    sections: Sequence[SaeSection], chunks: Sequence[Tensor], held_out: int = 1, checkpoints: str | None = None
) -> FitPlan:
    """Dictionaries that all see every column."""
    width = chunks[0].shape[1]
    return FitPlan(tuple(sections), ((0, width),) * len(sections), len(chunks), held_out, checkpoints)


def trained(data: Tensor, *sections: SaeSection, chunk: int = 300, checkpoints: str | None = None) -> list[FitResult]:
    """Fit on the rows of `data` in chunks, the first of which is held out."""
    chunks = data.split(chunk)
    plan = plan_of(sections, chunks, checkpoints=checkpoints)
    return fit(plan, stream_of(chunks), torch.device("cpu"), lambda _: None)
