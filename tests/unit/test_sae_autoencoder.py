import pytest
import torch
from torch import Tensor

from finescope.sae.autoencoder import Architecture, SparseAutoencoder, fold
from finescope.sae.fvu import FvuMeter

THRESHOLD = torch.linspace(0.1, 2.0, 12)


def standardised_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(12, 4, generator=generator), dim=1)
    return {
        "encoder_weight": torch.randn(12, 4, generator=generator),
        "encoder_bias": torch.randn(12, generator=generator),
        "decoder_weight": decoder,
        "decoder_bias": torch.randn(4, generator=generator),
        "mean": torch.tensor([50.0, -3.0, 0.0, 1.0]),
        "scale": torch.tensor([9.0, 0.5, 1.0, 2.0]),
    }


def autoencoder(architecture: Architecture = "topk", k: int = 3) -> SparseAutoencoder:
    folded = fold(**standardised_weights()) | {"coordinates": torch.tensor([1, 2, 4, 7])}
    if architecture in ("batch_topk", "jumprelu"):
        folded["threshold"] = THRESHOLD
    return SparseAutoencoder(folded, architecture=architecture, k=k, d_in=8)


def activations(count: int = 20) -> Tensor:
    raw = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    raw[:, [1, 2, 4, 7]] = raw[:, [1, 2, 4, 7]] * standardised_weights()["scale"] + standardised_weights()["mean"]
    return raw


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "relu_l1"])
def test_folded_normaliser_gives_the_codes_of_the_standardised_autoencoder(architecture: Architecture) -> None:
    w, raw = standardised_weights(), activations()
    standardised = (raw[:, [1, 2, 4, 7]] - w["mean"]) / w["scale"]
    latents = torch.relu((standardised - w["decoder_bias"]) @ w["encoder_weight"].T + w["encoder_bias"])
    if architecture == "topk":
        latents = torch.where(latents >= latents.topk(3).values[:, -1:], latents, 0.0)
    elif architecture != "relu_l1":
        latents = torch.where(latents > THRESHOLD, latents, 0.0)
    model = autoencoder(architecture)
    torch.testing.assert_close(model.encode(raw), latents, rtol=1e-4, atol=1e-4)
    reconstruction = (latents @ w["decoder_weight"] + w["decoder_bias"]) * w["scale"] + w["mean"]
    torch.testing.assert_close(model(raw), reconstruction, rtol=1e-4, atol=1e-3)
    error = model.reconstruction_error(raw, model(raw))
    expected = (standardised - latents @ w["decoder_weight"] - w["decoder_bias"]).square().sum(1)
    torch.testing.assert_close(error.error, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(error.total, standardised.square().sum(1), rtol=1e-4, atol=1e-4)


def test_other_coordinates_have_no_say() -> None:
    raw = activations()
    changed = raw.clone()
    changed[:, [0, 3, 5, 6]] = 1e6
    assert torch.equal(autoencoder().encode(raw), autoencoder().encode(changed))


def test_sparse_code_is_the_dense_one() -> None:
    model, raw = autoencoder(), activations()
    code = model.encode_sparse(raw)
    assert code.ids.shape == (20, 3)
    dense = torch.zeros(20, 12).scatter_(1, code.ids, code.values)
    assert torch.equal(dense, model.encode(raw))
    torch.testing.assert_close(model.decode_sparse(code), model.decode(dense))
    assert model.encode_sparse(raw, count=2).ids.shape == (20, 2)
    assert model.encode_sparse(raw, count=9).ids.shape == (20, 3), "topk has no more than k"
    assert autoencoder("relu_l1").encode_sparse(raw, count=9).ids.shape == (20, 9)


def test_half_precision_activations_are_encoded_in_single() -> None:
    assert autoencoder().encode(activations().bfloat16()).dtype == torch.float32


def test_fvu_by_hand() -> None:
    meter = FvuMeter()
    meter.update(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    assert meter.value == pytest.approx(1 / 2)
    meter.update(torch.tensor([[4.0]]), torch.tensor([[4.0]]))
    assert meter.value == pytest.approx(1 / 8)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_fvu_does_not_depend_on_the_batches(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 3, generator=generator) + torch.linspace(0, 100, 1000)[:, None]
    guess = x + 0.1 * torch.randn(1000, 3, generator=generator)
    meter = FvuMeter()
    for part, guessed in zip(x.split(size), guess.split(size), strict=True):
        meter.update(part, guessed)
    exact = (x - guess).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert meter.value == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize("basis", [False, True])
def test_splice_replaces_what_is_seen_and_nothing_else(basis: bool) -> None:
    raw = activations().double()
    if basis:
        rows = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0][:4]
        weights = fold(**standardised_weights()) | {"coordinates": torch.arange(8), "basis": rows}
        model = SparseAutoencoder(weights, architecture="topk", k=3, d_in=8)
        rest = torch.eye(8) - rows.T @ rows
    else:
        model = autoencoder()
        rest = torch.diag(torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0]))
    spliced = model.splice(raw)
    assert spliced.dtype == raw.dtype
    torch.testing.assert_close(model.select(spliced), model(raw), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(spliced.float() @ rest, raw.float() @ rest, rtol=1e-4, atol=1e-3)
