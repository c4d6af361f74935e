"""sparsify itself reads what finescope writes, and the other way round. `make test-peers` runs it."""

from pathlib import Path

import pytest
import torch
from peer_figures import agree
from sparsify import SparseCoder, SparseCoderConfig
from tiny_dictionary import D_IN, NUM_LATENTS, K, Reads, activations, assert_same, decided, tiny_dictionary
from torch import Tensor

from finescope.models.hooks import HookPoint
from finescope.sae.dictionary import load_dictionary
from finescope.sae.sparsify import save_sparsify


def codes(coder: SparseCoder, raw: Tensor) -> Tensor:
    encoded = coder.encode(raw)
    return torch.zeros(len(raw), coder.num_latents).scatter_(1, encoded.top_indices, encoded.top_acts)


@pytest.mark.parametrize("reads", ["all", "some", "pca"])
def test_sparsify_reads_ours(tmp_path: Path, reads: Reads, caplog: pytest.LogCaptureFixture) -> None:
    before = tiny_dictionary("topk", reads)
    where = save_sparsify(str(tmp_path / "run"), before)
    assert where == str(tmp_path / "run" / "layers.9")
    (theirs,) = SparseCoder.load_many(str(tmp_path / "run"), local=True).values()
    assert caplog.text == ""  # it tells of every key that it drops, and what it holds
    raw = decided(before.autoencoder, activations())
    agree(f"sparsify reads ours, topk, {reads}", codes(theirs, raw), before.autoencoder.encode(raw))
    if reads != "pca":
        rebuilt = theirs(raw).sae_out[:, before.autoencoder.coordinates]
        torch.testing.assert_close(rebuilt, before.autoencoder(raw), rtol=1e-5, atol=1e-4)
    assert_same(load_dictionary(where), before)


@pytest.mark.parametrize("sized_by", ["num_latents", "expansion_factor"])
def test_we_read_sparsify(tmp_path: Path, sized_by: str) -> None:
    size = {"num_latents": NUM_LATENTS} if sized_by == "num_latents" else {"expansion_factor": NUM_LATENTS // D_IN}
    torch.manual_seed(11)
    theirs = SparseCoder(D_IN, SparseCoderConfig(**size, k=K))
    with torch.no_grad():
        theirs.encoder.bias.copy_(0.3 * torch.randn(NUM_LATENTS))
        theirs.b_dec.copy_(torch.randn(D_IN))
    theirs.save_to_disk(tmp_path / "layers.9.mlp")
    ours = load_dictionary(str(tmp_path / "layers.9.mlp"))
    raw = decided(ours.autoencoder, activations())
    agree(f"we read sparsify, topk, {sized_by}", ours.autoencoder.encode(raw), codes(theirs, raw))
    torch.testing.assert_close(ours.autoencoder(raw), theirs(raw).sae_out, rtol=1e-5, atol=1e-4)
    assert (ours.hook, ours.fvu, ours.moments_known) == (HookPoint(10, "mlp"), None, False)
