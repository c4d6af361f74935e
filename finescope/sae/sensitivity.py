"""Which coordinates of the residual stream the autoencoder sees (METHOD 1.1; the paper's top-K activation selection)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from finescope.config import CoordinatesSection
from finescope.models.hooks import HookPoint, values_of_embeddings
from finescope.sae.stream import TokenBatch, stream_activations, used_positions


class Coordinates(NamedTuple):
    """The coordinates that are kept, and what every coordinate scored."""

    indices: Tensor  # [C] int64, sorted
    scores: Tensor  # [d_model] float64


def choose_coordinates(
    model: PreTrainedModel, batches: list[TokenBatch], layer: int, section: CoordinatesSection, seed: int
) -> Coordinates:
    """Score all coordinates on the first `section.documents` documents of `batches` and keep the best `section.count`.

    Of equal scores the lower index is kept. `count` above d_model keeps all.
    """
    sample = list(_limited(batches, section.documents))
    d_model = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    if section.method == "jacobian":
        scores = jacobian_scores(model, sample, layer, section.probes, generator)
    elif section.method == "random":
        scores = torch.rand(d_model, generator=generator, dtype=torch.float64)
    elif section.method == "all":
        scores = torch.ones(d_model, dtype=torch.float64)
    else:
        scores = _moment_scores(model, sample, layer, section.method)
    count = d_model if section.method == "all" else min(section.count, d_model)
    ranking = torch.argsort(scores, descending=True, stable=True)
    return Coordinates(ranking[:count].sort().values, scores)


def jacobian_scores(
    model: PreTrainedModel, batches: list[TokenBatch], layer: int, probes: int, generator: torch.Generator
) -> Tensor:
    """Root mean square over tokens of s_j = ||d a_j / d e||_F, e the input embeddings of the token's document.

    Unbiased in the square: u = J v with v of independent +-1 has E[u_j^2] = s_j^2 (Hutchinson), by forward mode.

    Returns:
        [d_model] float64.
    """
    device = model.device
    squares, count = torch.zeros(model.config.hidden_size, dtype=torch.float64), 0
    for input_ids, attention_mask in batches:
        mask = torch.from_numpy(attention_mask).to(device)
        embeddings = model.get_input_embeddings()(torch.from_numpy(input_ids).to(device))
        used = used_positions(mask)

        def residual(values: Tensor, mask: Tensor = mask) -> Tensor:
            return values_of_embeddings(model, values, mask, HookPoint(layer))

        for _ in range(probes):
            signs = torch.randint(0, 2, embeddings.shape, generator=generator) * 2 - 1
            # The fused attention kernels have no forward-mode rule.
            with sdpa_kernel(SDPBackend.MATH):
                change = torch.func.jvp(residual, (embeddings,), (signs.to(embeddings),))[1]
            squares += change[used].double().square().sum(0).cpu()
            count += int(used.sum())
    return (squares / max(count, 1)).sqrt()


def _moment_scores(model: PreTrainedModel, batches: list[TokenBatch], layer: int, method: str) -> Tensor:
    """Mean magnitude, or variance, of each coordinate: [d_model] float64."""
    activations = torch.cat([chunk.double() for chunk in stream_activations(model, batches, layer)]).cpu()
    return activations.abs().mean(0) if method == "magnitude" else activations.var(0, correction=0)


def _limited(batches: list[TokenBatch], documents: int) -> Iterator[TokenBatch]:
    left = documents
    for input_ids, attention_mask in batches:
        if left <= 0:
            return
        yield input_ids[:left], attention_mask[:left]
        left -= len(input_ids)
