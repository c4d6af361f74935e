"""Random dictionaries of every kind, and activations whose coordinates differ in size as those of a model do."""

from typing import Literal

import torch
from torch import Tensor

from finescope.models.hooks import HookPoint
from finescope.sae.autoencoder import Architecture, SparseAutoencoder, fold
from finescope.sae.record import Dictionary, record_of

ARCHITECTURES: tuple[Architecture, ...] = ("topk", "batch_topk", "jumprelu", "relu_l1")
D_IN, NUM_LATENTS, K = 64, 256, 8
Reads = Literal["all", "some", "pca"]
_COUNT = {"all": D_IN, "some": 24, "pca": 12}
_MODULES = {
    "residual": "model.layers.9",
    "attention": "model.layers.9.self_attn.o_proj",
    "mlp": "model.layers.9.mlp",
    "mlp_hidden": "model.layers.9.mlp.down_proj",
}


def activations(count: int = 200, d_in: int = D_IN) -> Tensor:
    """[count, d_in]; means up to some ten, deviations from 0.3 to 3."""
    generator = torch.Generator().manual_seed(7)
    scale = torch.linspace(0.3, 3.0, d_in)
    return torch.randn(count, d_in, generator=generator) * scale + 4 * torch.randn(d_in, generator=generator)


def tiny_dictionary(architecture: Architecture = "topk", reads: Reads = "some", hook: HookPoint = HookPoint(10)) -> Dictionary:
    """A dictionary with the normaliser of `activations` folded in; `reads` all or some coordinates, or a subspace."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    coordinates = torch.arange(D_IN) if reads == "all" else torch.randperm(D_IN, generator=generator)[:24].sort().values
    basis = torch.linalg.qr(normal(len(coordinates), _COUNT[reads])).Q.T.contiguous() if reads == "pca" else None
    seen = activations()[:, coordinates]
    seen = seen if basis is None else seen @ basis.T
    count = _COUNT[reads]
    weights = fold(
        encoder_weight=normal(NUM_LATENTS, count) / count**0.5,
        encoder_bias=0.1 * normal(NUM_LATENTS),
        decoder_weight=torch.nn.functional.normalize(normal(NUM_LATENTS, count), dim=1),
        decoder_bias=0.1 * normal(count),
        mean=seen.mean(0),
        scale=seen.std(0),
    )
    if architecture == "jumprelu":
        weights["threshold"] = torch.rand(NUM_LATENTS, generator=generator)
    if architecture == "batch_topk":
        weights["threshold"] = torch.full((NUM_LATENTS,), 0.7)
    if basis is not None:
        weights["basis"] = basis
    autoencoder = SparseAutoencoder({**weights, "coordinates": coordinates}, architecture=architecture, k=K, d_in=D_IN)
    method = "jacobian" if basis is None else "pca"
    return Dictionary(autoencoder, hook, method, "org/model", "abc", "f" * 64, _MODULES[hook.site], 0.25)


def decided(autoencoder: SparseAutoencoder, raw: Tensor) -> Tensor:
    """The rows of `raw` [N, d_in] on whose active latents rounding has no say: none is within 1e-4 of the cut."""
    pre = torch.relu(
        (autoencoder.select(raw) - autoencoder.decoder_bias) @ autoencoder.encoder_weight.T + autoencoder.encoder_bias
    )
    if autoencoder.architecture == "topk":
        ordered = pre.topk(autoencoder.k + 1, dim=1).values
        clear = ordered[:, -2] - ordered[:, -1] > 1e-4
    else:
        clear = ((pre - autoencoder.threshold).abs() > 1e-4).logical_or(autoencoder.threshold == 0).all(1)
    assert clear.float().mean() > 0.5
    return raw[clear]


def assert_same(found: Dictionary, expected: Dictionary) -> None:
    """Equal records, equal shapes, equal codes and reconstructions (to rounding)."""
    assert record_of(found) == record_of(expected)
    ours, theirs = found.autoencoder, expected.autoencoder
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name in ("coordinates", "mean", "scale", "threshold", *(("basis",) if theirs.basis is not None else ())):
        assert torch.equal(ours.state_dict()[name], theirs.state_dict()[name]), name
    raw = decided(theirs, activations())
    torch.testing.assert_close(ours.encode(raw), theirs.encode(raw), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(raw), theirs(raw), rtol=1e-5, atol=1e-4)
