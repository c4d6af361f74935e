"""Dictionaries on a GPU: the sparse products against dense ones, and a training in bf16 that finds what is planted."""

import pytest
import torch
from torch import Tensor

from finescope.config import SaeSection
from finescope.sae.fit import FitPlan, fit
from finescope.sae.objective import Scratch, Weights, losses
from finescope.sae.sparse import rows_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS, LATENTS, WIDTH, K = 512, 2048, 96, 16


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def test_products_are_the_dense_ones() -> None:
    ids = random(ROWS, LATENTS, seed=0).topk(K, dim=1).indices
    pattern, values = rows_of(ids, LATENTS), random(ROWS * K, seed=1)
    latents, activations = random(LATENTS, WIDTH, seed=2), random(ROWS, WIDTH, seed=3)
    full = torch.zeros(ROWS, LATENTS, device="cuda").scatter_(1, ids, values.view(ROWS, K))
    torch.testing.assert_close(pattern.mix(values, latents), full @ latents, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(pattern.collect(values, activations), full.T @ activations, rtol=1e-4, atol=1e-3)
    every = (activations @ latents.T).gather(1, ids).flatten()
    torch.testing.assert_close(pattern.products(activations, latents), every, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_gradients_are_those_of_the_latents_that_were_chosen(architecture: str) -> None:
    """The choice is made in bfloat16, so that the dense reference takes the same latents from it."""
    section = SaeSection.model_validate({"architecture": architecture, "num_latents": LATENTS, "k": K, "auxk": 8})
    decoder = torch.nn.functional.normalize(random(LATENTS, WIDTH, seed=4), dim=1)
    biases = 0.1 * random(LATENTS, seed=5), 0.1 * random(WIDTH, seed=6)

    def fresh() -> Weights:
        encoder, of_latents, directions, of_stream = (
            tensor.clone().requires_grad_() for tensor in (decoder, biases[0], decoder, biases[1])
        )
        return Weights(encoder, of_latents, directions, of_stream, None)

    weights, reference = fresh(), fresh()
    batch, none = random(ROWS, WIDTH, seed=7), torch.empty(0, dtype=torch.int64, device="cuda")
    losses(weights, batch, section, none, Scratch()).total.backward()
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        chosen = torch.nn.functional.linear(batch - reference.decoder_bias, reference.encoder_weight, reference.encoder_bias)
    if architecture == "topk":
        kept = torch.zeros_like(chosen).scatter_(1, chosen.topk(K, dim=1).indices, 1.0).float()
    else:
        kept = (chosen >= chosen.flatten().topk(K * ROWS).values[-1]).float()
    pre = (batch - reference.decoder_bias) @ reference.encoder_weight.T + reference.encoder_bias
    reconstruction = (pre.relu() * kept) @ reference.decoder_weight + reference.decoder_bias
    (batch - reconstruction).square().mean().backward()
    for name, weight in weights.named().items():
        expected = reference.named()[name].grad
        torch.testing.assert_close(weight.grad, expected, rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "relu_l1"])
def test_a_training_on_the_gpu_explains_what_is_planted(architecture: str) -> None:
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    random_ = torch.Generator().manual_seed(1)
    ids = torch.rand(6300, 24, generator=random_).topk(2).indices
    data = torch.zeros(6300, 24).scatter_(1, ids, 1 + torch.rand(6300, 2, generator=random_)) @ directions
    section = SaeSection.model_validate(
        {"architecture": architecture, "num_latents": 32, "k": 3, "num_tokens": 6000, "batch_tokens": 200, "epochs": 15}
        | {"learning_rate": 5e-3, "dead_after_tokens": 2000, "l0_coefficient": 0.01, "l1_coefficient": 0.003}
    )
    chunks = data.split(300)
    plan = FitPlan((section,), ((0, 16),), len(chunks), 1, None)
    stream = lambda start, stop, step: (chunks[number].numpy() for number in range(start, stop, step))  # noqa: E731
    (result,) = fit(plan, stream, torch.device("cuda"), lambda _: None)
    assert result.held_out.fvu < 0.15
    assert result.autoencoder.decoder_weight.is_cuda
