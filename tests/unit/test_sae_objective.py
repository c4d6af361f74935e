from typing import Any

import pytest
import torch
from sae_streams import section
from torch import Tensor

from finescope.config import SaeSection
from finescope.sae import objective, sparse
from finescope.sae.objective import Scratch, Weights, losses

ROWS, LATENTS, WIDTH = 23, 40, 12
DEAD = torch.tensor([1, 4, 5, 9, 17, 30, 39])
NO_DEAD = torch.empty(0, dtype=torch.int64)


def weights(seed: int = 0, jump: bool = False) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    decoder = torch.nn.functional.normalize(random(LATENTS, WIDTH), dim=1)
    tensors = [decoder + 0.1 * random(LATENTS, WIDTH), 0.3 * random(LATENTS), decoder, 0.3 * random(WIDTH)]
    threshold = (0.2 + 0.5 * torch.rand(LATENTS, generator=generator)).log() if jump else None
    made = Weights(*tensors, threshold)
    for tensor in made.named().values():
        tensor.requires_grad_()
    return made


def batch() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(9))


def naive(w: Weights, x: Tensor, settings: SaeSection, dead: Tensor) -> Tensor:
    """The objective by dense products and autograd alone."""
    pre = (x - w.decoder_bias) @ w.encoder_weight.T + w.encoder_bias
    penalty: Any = 0.0
    if settings.architecture == "topk":
        kept = torch.zeros_like(pre).scatter(1, pre.topk(settings.k, dim=1).indices, 1.0)
        values = pre.relu() * kept
    elif settings.architecture == "batch_topk":
        lowest = pre.detach().flatten().sort(descending=True).values[settings.k * len(x) - 1]
        values = pre.relu() * (pre >= lowest)
    else:
        values = pre.relu()
        penalty = settings.l1_coefficient * values.sum() / len(x)
    residual = x - values @ w.decoder_weight - w.decoder_bias
    total = residual.square().mean() + penalty
    if len(dead):
        largest = pre[:, dead].topk(min(settings.auxk, len(dead)), dim=1)
        leaky = torch.nn.functional.leaky_relu(largest.values, 0.1)
        # The slope is in the gradient only: what is reconstructed with is the ReLU's value.
        through = largest.values.relu().detach() + leaky - leaky.detach()
        aux = torch.zeros_like(pre).scatter(1, dead[largest.indices], through)
        target = residual.detach()
        total = total + settings.auxk_coefficient * (target - aux @ w.decoder_weight).square().sum() / target.square().sum()
    return total


@pytest.mark.parametrize(("dead", "dense_from"), [(NO_DEAD, 1.0), (DEAD, 0.0), (DEAD, 1.0), (DEAD[:2], 1.0)])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu_l1"])
def test_value_and_gradients_are_those_of_dense_products(
    architecture: str, dead: Tensor, dense_from: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sparse products, by dense ones, and with fewer dead latents than it may take."""
    monkeypatch.setattr(sparse, "_DENSE_SHARE", dense_from)
    settings = section(architecture=architecture, num_latents=LATENTS, k=5, auxk=3, auxk_coefficient=0.5, l1_coefficient=0.01)
    found, expected = weights(), weights()
    loss = losses(found, batch(), settings, dead, Scratch())
    loss.total.backward()
    reference = naive(expected, batch(), settings, dead)
    reference.backward()
    torch.testing.assert_close(loss.total, reference)
    for name, weight in found.named().items():
        torch.testing.assert_close(weight.grad, expected.named()[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_figures_of_a_batch() -> None:
    settings = section(num_latents=LATENTS, k=5)
    w, x = weights(), batch()
    found = losses(w, x, settings, NO_DEAD, Scratch())
    pre = (x - w.decoder_bias) @ w.encoder_weight.T + w.encoder_bias
    values = torch.zeros_like(pre).scatter(1, pre.topk(5, dim=1).indices, 1.0) * pre.relu()
    assert torch.equal(found.active, (values > 0).any(0))
    assert found.num_active == (values > 0).sum()
    error = (x - values @ w.decoder_weight - w.decoder_bias).square().sum()
    assert found.error.item() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_batch_topk_finds_what_lies_in_few_rows(k: int) -> None:
    """One row has more of the largest entries than are looked for in a row at first."""
    pre = batch() @ torch.randn(WIDTH, LATENTS, generator=torch.Generator().manual_seed(1))
    pre[3] = pre[3].abs() + 50
    pattern, values = objective._largest_of_batch(pre, k)
    expected = pre.flatten().sort(descending=True).values[: k * ROWS]
    assert values.sort(descending=True).values.tolist() == expected[expected > 0].tolist()
    assert torch.equal(pre[pattern.rows(), pattern.ids], values)


def test_jumprelu_gradients_are_those_of_the_paper() -> None:
    """arXiv 2407.14435, equations 11 and 12: a rectangle of width epsilon around the threshold."""
    settings = section(architecture="jumprelu", num_latents=LATENTS, l0_coefficient=0.02)
    w, x = weights(jump=True), batch()
    assert w.log_threshold is not None
    found = losses(w, x, settings, NO_DEAD, Scratch())
    found.total.backward()
    threshold = w.log_threshold.detach().exp()
    pre = ((x - w.decoder_bias) @ w.encoder_weight.T + w.encoder_bias).detach()
    values = torch.where(pre > threshold, pre, 0.0)
    residual = x - values @ w.decoder_weight - w.decoder_bias
    expected = residual.square().mean() + settings.l0_coefficient * (values > 0).sum() / ROWS
    torch.testing.assert_close(found.total, expected)
    of_values = (-2 * residual.detach() / residual.numel()) @ w.decoder_weight.detach().T  # dL/dz
    epsilon = objective._BANDWIDTH
    near = ((pre - threshold).abs() < epsilon / 2).float()
    assert near.sum() > 50
    of_threshold = -(near * (threshold * of_values + settings.l0_coefficient / ROWS)).sum(0) / epsilon
    torch.testing.assert_close(w.log_threshold.grad, of_threshold * threshold, rtol=1e-4, atol=1e-7)
    of_pre = of_values * (values > 0)
    torch.testing.assert_close(w.encoder_bias.grad, of_pre.sum(0), rtol=1e-4, atol=1e-6)
