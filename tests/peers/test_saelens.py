"""SAELens itself reads what finescope writes, and the other way round. `make test-peers` runs it."""

from pathlib import Path

import pytest
import torch
from peer_figures import agree
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from tiny_dictionary import ARCHITECTURES, D_IN, NUM_LATENTS, K, Reads, activations, assert_same, decided, tiny_dictionary

from finescope.models.hooks import HookPoint
from finescope.sae.autoencoder import Architecture
from finescope.sae.dictionary import load_dictionary
from finescope.sae.saelens import save_saelens

SHAPE = {"d_in": D_IN, "d_sae": NUM_LATENTS}


def metadata(hook: str = "blocks.9.hook_resid_post") -> SAEMetadata:
    return SAEMetadata(model_name="org/model", hook_name=hook, prepend_bos=True)


def randomise(sae: torch.nn.Module) -> None:
    """Weights as after some training: decoder rows of every norm, a pre-bias near the mean, biases that count."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"W_enc": D_IN**-0.5, "W_dec": D_IN**-0.5, "b_enc": 0.3, "b_dec": 0.3}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in sizes:
                parameter.copy_(sizes[name] * torch.randn(parameter.shape, generator=generator))
            if name == "W_dec":
                parameter.mul_(torch.rand(len(parameter), 1, generator=generator) + 0.1)
            if name == "b_dec":
                parameter.add_(activations().mean(0))
            if name == "threshold":
                parameter.copy_(2 * torch.rand(parameter.shape, generator=generator))


@pytest.mark.parametrize("reads", ["all", "some", "pca"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_reads_ours(tmp_path: Path, architecture: Architecture, reads: Reads) -> None:
    before = tiny_dictionary(architecture, reads)
    save_saelens(str(tmp_path / "sae"), before)
    theirs = SAE.load_from_disk(tmp_path / "sae")
    raw = decided(before.autoencoder, activations())
    agree(f"sae-lens reads ours, {architecture}, {reads}", theirs.encode(raw), before.autoencoder.encode(raw))
    if reads != "pca":
        rebuilt = theirs(raw)[:, before.autoencoder.coordinates]
        torch.testing.assert_close(rebuilt, before.autoencoder(raw), rtol=1e-5, atol=1e-4)
    assert theirs.cfg.metadata.hook_name == "blocks.9.hook_resid_post"


@pytest.mark.parametrize("reads", ["all", "some", "pca"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ours_comes_back_from_saelens(tmp_path: Path, architecture: Architecture, reads: Reads) -> None:
    before = tiny_dictionary(architecture, reads)
    save_saelens(str(tmp_path / "ours"), before)
    SAE.load_from_disk(tmp_path / "ours").save_model(tmp_path / "theirs")
    assert_same(load_dictionary(str(tmp_path / "theirs")), before)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["topk", "topk rescaled", "standard", "jumprelu"])
def test_we_read_saelens(tmp_path: Path, kind: str, centred: bool) -> None:
    common = {**SHAPE, "apply_b_dec_to_input": centred, "metadata": metadata()}
    if kind == "standard":
        theirs = StandardSAE(StandardSAEConfig(**common))
    elif kind == "jumprelu":
        theirs = JumpReLUSAE(JumpReLUSAEConfig(**common))
    else:
        theirs = TopKSAE(TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=kind == "topk rescaled"))
    randomise(theirs)
    theirs.save_model(tmp_path / "sae")
    ours = load_dictionary(str(tmp_path / "sae"))
    raw = decided(ours.autoencoder, activations())
    agree(f"we read sae-lens, {kind}, apply_b_dec_to_input {centred}", ours.autoencoder.encode(raw), theirs.encode(raw))
    torch.testing.assert_close(ours.autoencoder(raw), theirs(raw), rtol=1e-5, atol=1e-3)
    assert (ours.hook, ours.model_path, ours.fvu, ours.moments_known) == (HookPoint(10), "org/model", None, False)
    assert ours.autoencoder.architecture == {"standard": "relu_l1"}.get(kind, kind.split()[0])


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_we_read_what_their_trainers_save(tmp_path: Path, kind: str, rescaled: bool) -> None:
    common = {**SHAPE, "k": K, "rescale_acts_by_decoder_norm": rescaled, "metadata": metadata()}
    if kind == "topk":
        trained = TopKTrainingSAE(TopKTrainingSAEConfig(**common))
    else:
        trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common))
        trained.topk_threshold.fill_(1.5)
    randomise(trained)
    # The checkpoint first: saving for inference folds the norms into the very weights that are saved.
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "inference")
    raw = decided(load_dictionary(str(tmp_path / "inference")).autoencoder, activations())
    expected = SAE.load_from_disk(tmp_path / "inference").encode(raw)
    for saved in ("inference", "checkpoint"):
        ours = load_dictionary(str(tmp_path / saved)).autoencoder
        agree(f"we read sae-lens's {saved}, {kind}, rescaled {rescaled}", ours.encode(raw), expected)
        assert (ours.architecture, ours.k) == (kind, K)


def test_bfloat16_weights_are_read(tmp_path: Path) -> None:
    theirs = TopKSAE(TopKSAEConfig(**SHAPE, k=K, dtype="bfloat16", metadata=metadata("blocks.3.hook_mlp_out")))
    randomise(theirs)
    theirs.save_model(tmp_path / "sae")
    ours = load_dictionary(str(tmp_path / "sae"))
    raw = decided(ours.autoencoder, activations())
    assert ours.autoencoder.encoder_weight.dtype == torch.float32
    assert ours.hook == HookPoint(4, "mlp")
    agree("we read sae-lens, bfloat16 weights", ours.autoencoder.encode(raw), theirs.to(dtype=torch.float32).encode(raw))
