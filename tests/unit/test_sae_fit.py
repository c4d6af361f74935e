from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from finescope.config import SaeSection
from finescope.errors import StepFailed
from finescope.sae.fit import FitResult, fit, work_units

WIDTH = 16


def section(**settings: Any) -> SaeSection:
    base: dict[str, Any] = {
        "num_latents": 32,
        "k": 3,
        "num_tokens": 6000,
        "batch_tokens": 200,
        "buffer_tokens": 6000,
        "epochs": 8,
        "learning_rate": 5e-3,
        "dead_after_tokens": 2000,
        "auxk": 8,
    }
    return SaeSection.model_validate(base | settings)


def planted(count: int, latents: int = 24, active: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sparse positive sums of random unit directions: activations [count, WIDTH] and the directions [latents, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(latents, WIDTH, generator=generator), dim=1)
    ids = torch.rand(count, latents, generator=generator).topk(active).indices
    values = 1 + torch.rand(count, active, generator=generator)
    return torch.zeros(count, latents).scatter_(1, ids, values) @ directions, directions


def trained(data: Tensor, settings: SaeSection, chunk: int = 500) -> FitResult:
    return fit(iter(data.split(chunk)), settings, torch.arange(data.shape[1]), lambda _: None)


def test_planted_directions_are_recovered() -> None:
    data, directions = planted(7000)
    result = trained(data, section(epochs=15))
    learned = torch.nn.functional.normalize(result.autoencoder.decoder_weight, dim=1)
    cosine = (directions @ learned.T).max(dim=1).values
    assert cosine.mean() >= 0.9
    assert result.fvu < 0.1
    assert result.l0 <= 3


def test_held_out_tail_is_measured_over_the_whole_of_it() -> None:
    data, _ = planted(6300)
    result = trained(data, section(epochs=1))
    assert (result.trained_tokens, result.held_out_tokens) == (6000, 300)
    error = result.autoencoder.reconstruction_error(data[6000:], result.autoencoder(data[6000:]))
    held_out = data[6000:] / result.autoencoder.scale
    exact = error.error.sum() / (held_out - held_out.mean(0)).square().sum()
    assert result.fvu == pytest.approx(exact.item(), rel=1e-4)


def test_standardisation_is_folded_in() -> None:
    """Shifting and stretching coordinates changes nothing but the folded weights."""
    data, _ = planted(2000)
    stretch, shift = torch.logspace(-1, 1, WIDTH), torch.linspace(-20, 20, WIDTH)
    plain = trained(data, section(epochs=1, num_tokens=1800))
    moved = trained(data * stretch + shift, section(epochs=1, num_tokens=1800))
    assert moved.fvu == pytest.approx(plain.fvu, rel=1e-2)
    norms = (moved.autoencoder.decoder_weight / moved.autoencoder.scale).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(32), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(moved.autoencoder.mean, (data[:1800] * stretch + shift).mean(0), rtol=1e-4, atol=1e-4)


def test_chosen_coordinates_alone_are_fitted() -> None:
    data, _ = planted(1500)
    coordinates = torch.tensor([2, 5, 11])
    noisy = data.clone()
    noisy[:, 0] = float("nan")
    result = fit(iter(noisy.split(100)), section(num_tokens=1400, epochs=1), coordinates, lambda _: None)
    assert result.autoencoder.coordinates.tolist() == [2, 5, 11]
    assert result.autoencoder.d_model == WIDTH
    assert result.autoencoder(data).shape == (1500, 3)


@pytest.mark.parametrize("architecture", ["topk", "relu_l1"])
def test_same_seed_same_weights_whatever_the_chunks(architecture: str) -> None:
    data, _ = planted(2000)
    settings = section(num_tokens=1900, epochs=2, buffer_tokens=700, architecture=architecture)
    first, second = trained(data, settings, chunk=64), trained(data, settings, chunk=999)
    for name, weight in first.autoencoder.state_dict().items():
        assert torch.equal(weight, second.autoencoder.state_dict()[name]), name
    assert first.history == second.history
    other = trained(data, settings.model_copy(update={"seed": 1}))
    assert not torch.equal(other.autoencoder.encoder_weight, first.autoencoder.encoder_weight)


@pytest.mark.parametrize("architecture", ["topk", "relu_l1"])
def test_number_of_threads_has_no_say(architecture: str) -> None:
    """Batches beyond 32,768 values, where torch splits a sum among threads, and dead latents."""
    data = torch.randn(1500, 80, generator=torch.Generator().manual_seed(0))
    settings = section(num_tokens=1400, batch_tokens=500, epochs=4, dead_after_tokens=600, architecture=architecture, k=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(trained(data, settings))
    finally:
        torch.set_num_threads(before)
    for name, weight in results[0].autoencoder.state_dict().items():
        assert torch.equal(weight, results[1].autoencoder.state_dict()[name]), name
    assert (results[0].fvu, results[0].history) == (results[1].fvu, results[1].history)


@pytest.mark.parametrize("architecture", ["topk", "relu_l1"])
def test_auxk_revives_dead_latents(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from finescope.sae import fit as module

    start = module._Trainer.__init__

    def half_dead(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        with torch.no_grad():
            self.encoder_bias[::2] = -3.0

    monkeypatch.setattr(module._Trainer, "__init__", half_dead)
    data, _ = planted(6300)
    settings = section(architecture=architecture, l1_coefficient=1e-3, auxk=16, dead_after_tokens=1500)
    without = trained(data, settings.model_copy(update={"auxk_coefficient": 0.0}))
    revived = trained(data, settings)
    assert without.dead_share >= 0.4
    assert revived.dead_share <= 0.1
    if architecture == "topk":
        assert revived.fvu < without.fvu


def test_relu_l1_trades_reconstruction_for_sparsity() -> None:
    data, _ = planted(6300)
    dense = trained(data, section(architecture="relu_l1", l1_coefficient=0.0, epochs=4))
    sparse = trained(data, section(architecture="relu_l1", l1_coefficient=0.02, epochs=4))
    assert sparse.l0 < dense.l0
    assert dense.fvu < sparse.fvu < 0.5


def test_history_and_progress() -> None:
    data, _ = planted(6300)
    settings, told = section(epochs=2, buffer_tokens=2500), []
    result = fit(iter(data.split(500)), settings, torch.arange(WIDTH), told.append)
    assert sum(told) == work_units(settings)
    assert {name for _, name, _ in result.history} == {"fvu", "l0", "dead_share"}
    steps = [step for step, name, _ in result.history if name == "fvu"]
    assert steps == sorted(set(steps))
    values = [value for _, name, value in result.history if name == "fvu"]
    assert values[-1] < values[0]


def test_more_latents_than_activations() -> None:
    data, _ = planted(40)
    result = trained(data, section(num_latents=64, epochs=1))
    assert torch.isfinite(result.autoencoder.decoder_weight).all()


def test_constant_coordinate_does_no_harm() -> None:
    data, _ = planted(1000)
    data[:, 3] = 7.0
    result = trained(data, section(num_tokens=900, epochs=1))
    assert torch.isfinite(result.autoencoder(data)).all()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_activations(count: int) -> None:
    def stream() -> Iterator[Tensor]:
        if count:
            yield torch.randn(count, WIDTH)

    with pytest.raises(StepFailed, match="too few tokens"):
        fit(stream(), section(), torch.arange(WIDTH), lambda _: None)


def test_equal_activations_have_no_fvu() -> None:
    with pytest.raises(StepFailed, match="all equal"):
        trained(torch.ones(300, WIDTH), section(num_tokens=280, epochs=1))


def test_divergence_is_told() -> None:
    data, _ = planted(1000)
    data[700] = float("inf")
    with pytest.raises(StepFailed, match="loss is nan"):
        trained(data, section(num_tokens=900, epochs=1))
