from pathlib import Path

import numpy as np
import pytest
import torch
from sae_corpus import reference_of_tiny
from tiny_run import write_inputs

from finescope.config import EmbedSection
from finescope.corpus.tokenise import tokenise
from finescope.curation.embed import embed_texts
from finescope.models.hooks import HookPoint, Site, capture
from finescope.models.load import load_model, load_tokenizer
from finescope.sae.autoencoder import Architecture, SparseAutoencoder
from finescope.sae.dictionary import save_dictionary
from finescope.sae.record import Dictionary

TEXTS = ["sum of the prime", "salt and butter then roast the onion", "the", "root root square equation angle proof number"]
WIDTHS: dict[Site, int] = {"residual": 32, "mlp": 32, "mlp_hidden": 64}


def dictionary(site: Site, architecture: Architecture) -> Dictionary:
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.arange(1, WIDTHS[site], 3)
    count, latents = len(coordinates), 40
    weights = {
        "encoder_weight": torch.randn(latents, count, generator=generator),
        "encoder_bias": 0.1 * torch.randn(latents, generator=generator),
        "decoder_weight": torch.randn(latents, count, generator=generator),
        "decoder_bias": torch.randn(count, generator=generator),
        "coordinates": coordinates,
        "mean": torch.zeros(count),
        "scale": torch.ones(count),
    }
    if architecture == "jumprelu":
        weights["threshold"] = torch.full((latents,), 0.5)
    autoencoder = SparseAutoencoder(weights, architecture=architecture, k=4, d_in=WIDTHS[site])
    return Dictionary(autoencoder, HookPoint(2, site), "jacobian", "tiny", None, None, "somewhere", 0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("embed"), documents=8)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(("site", "architecture"), [("residual", "topk"), ("mlp_hidden", "topk"), ("mlp", "jumprelu")])
def test_codes_are_pooled_latents_at_the_dictionarys_own_hook_point(
    root: Path, site: Site, architecture: Architecture, pooling: str
) -> None:
    made = dictionary(site, architecture)
    save_dictionary(str(root / "dictionary"), made)
    section = EmbedSection.model_validate({"pooling": pooling, "keep_latents": 40, "max_tokens": 32})
    found = embed_texts(TEXTS, reference_of_tiny(root), str(root / "dictionary"), section).to_pylist()
    model, tokenizer = load_model(reference_of_tiny(root)), load_tokenizer(reference_of_tiny(root))
    for row, tokens in zip(found, tokenise(tokenizer, TEXTS, 32), strict=True):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        assert row["num_tokens"] == len(tokens)
        if len(tokens) < 2:
            assert row["latent_ids"] == []
            continue
        latents = made.autoencoder.encode(capture(model, ids, torch.ones_like(ids), [HookPoint(2, site)])[0][0, 1:])
        pooled = latents.mean(0) if pooling == "mean" else latents.amax(0)
        code = np.zeros(40)
        code[row["latent_ids"]] = row["latent_values"]
        np.testing.assert_allclose(code, pooled.numpy(), rtol=2e-3, atol=1e-3)
