import pytest
import torch
from sae_dictionaries import random_autoencoder
from torch import Tensor

from finescope.sae import stability as module
from finescope.sae.autoencoder import SparseAutoencoder, fold
from finescope.sae.stability import stability


def _with_rows(rows: Tensor, coordinates: list[int], scale: Tensor | None = None) -> SparseAutoencoder:
    size = len(coordinates)
    weights = fold(rows, torch.zeros(len(rows)), rows, torch.zeros(size), torch.zeros(size), torch.ones(size))
    if scale is not None:
        weights = fold(rows, torch.zeros(len(rows)), rows, torch.zeros(size), torch.ones(size), scale)
    return SparseAutoencoder(weights | {"coordinates": torch.tensor(coordinates)}, architecture="relu_l1", k=1, d_in=9)


def test_by_hand() -> None:
    one = _with_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), [2, 5])
    other = _with_rows(torch.tensor([[0.6, 0.8], [1.0, 0.0]]), [2, 5])
    # Best of one: 1, 0.8 and, of -1's cosines -0.6 and -1, -0.6; best of the other: 0.8 and 1.
    found = stability(one, other)
    assert found.cosine == pytest.approx(((1 + 0.8 - 0.6) / 3 + (0.8 + 1) / 2) / 2)
    assert found.shared == pytest.approx((2 / 3 + 1) / 2)


def test_order_of_latents_and_units_have_no_say() -> None:
    rows = torch.nn.functional.normalize(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    shuffled = rows[torch.randperm(10, generator=torch.Generator().manual_seed(1))]
    one = _with_rows(rows, [0, 1, 2, 3])
    other = _with_rows(shuffled, [0, 1, 2, 3], torch.tensor([100.0, 1.0, 0.01, 5.0]))
    assert stability(one, other) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_what_only_one_sees_counts_as_zero_in_the_other() -> None:
    one = _with_rows(torch.tensor([[0.6, 0.8]]), [1, 4])
    other = _with_rows(torch.tensor([[1.0, 0.0]]), [4, 7])
    assert stability(one, other) == pytest.approx((0.8, 1.0))


def test_a_rotated_basis_is_seen_through() -> None:
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    plain = random_autoencoder("relu_l1")
    plain.scale.fill_(1.0)
    weights = {**plain.state_dict(), "basis": turn, "decoder_weight": plain.decoder_weight @ turn.T}
    turned = SparseAutoencoder(weights, architecture="relu_l1", k=1, d_in=16)
    assert stability(plain, turned) == pytest.approx((1.0, 1.0), abs=1e-5)


@pytest.mark.parametrize("block", [1, 7, 16, 4096])
def test_blocks_have_no_say(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = random_autoencoder(num_latents=24), random_autoencoder(num_latents=17, seed=1)
    rows, others = ((each.decoder_weight / each.scale).double() for each in (one, other))
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], others[None], dim=2)
    best, best_of_others = cosines.amax(1), cosines.amax(0)
    monkeypatch.setattr(module, "_BLOCK_LATENTS", block)
    found = stability(one, other)
    assert found.cosine == pytest.approx(float(best.mean() + best_of_others.mean()) / 2, rel=1e-6)
    assert found.shared == pytest.approx(float((best > 0.7).double().mean() + (best_of_others > 0.7).double().mean()) / 2)
    assert stability(other, one) == pytest.approx(tuple(found), rel=1e-6)
