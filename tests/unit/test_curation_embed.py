from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sae_corpus import reference_of_tiny
from tiny_run import MATHS, sentence, write_inputs

from finescope.config import EmbedSection
from finescope.corpus.tokenise import tokenise
from finescope.curation.embed import Embedder, _table, embed_texts
from finescope.errors import ResourceError
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


def random_texts(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [sentence(MATHS, random, int(random.integers(1, 14))) for _ in range(count)]


@pytest.fixture
def embedder(root: Path) -> Embedder:
    save_dictionary(str(root / "dictionary"), dictionary("residual", "topk"))
    section = EmbedSection(max_tokens=32, keep_latents=12, batch_tokens=64)
    return Embedder(reference_of_tiny(root), str(root / "dictionary"), section)


def test_a_code_does_not_depend_on_the_documents_beside_it(embedder: Embedder) -> None:
    texts = random_texts(30)
    together = embedder(texts).to_pylist()
    for row, text in zip(together, texts, strict=True):
        (alone,) = embedder([text]).to_pylist()
        assert row["latent_ids"] == alone["latent_ids"] == sorted(row["latent_ids"])
        np.testing.assert_allclose(row["latent_values"], alone["latent_values"], rtol=2e-3)
        assert len(row["latent_ids"]) <= 12


def assert_close(found: pa.Table, expected: pa.Table) -> None:
    """The same documents and latents; values to the resolution of float16, as products of other shapes round otherwise."""
    assert found.drop_columns(["fvu", "latent_values"]).equals(expected.drop_columns(["fvu", "latent_values"]))
    np.testing.assert_allclose(found.column("fvu"), expected.column("fvu"), rtol=1e-5)
    values = [table.column("latent_values").combine_chunks().flatten().to_numpy() for table in (found, expected)]
    np.testing.assert_allclose(*values, rtol=2e-3)


def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, pooled = random_texts(30), embedder._pooled
    expected = embedder(texts)
    tried: list[int] = []
    memory = 20

    def limited(ids: np.ndarray, mask: np.ndarray) -> Any:
        tried.append(ids.size)
        if ids.size > memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pooled(ids, mask)

    monkeypatch.setattr(embedder, "_pooled", limited)
    assert_close(embedder(texts), expected)
    # The longest document has 13 tokens, of which 4 are within 64: one of four, then two, then one fits.
    assert [size for size in tried if size > memory] == [52, 26]
    tried.clear()
    assert_close(embedder(texts), expected)
    assert max(tried) <= memory
    memory = 12
    with pytest.raises(ResourceError, match=r"a document of 13 tokens does not fit .* lower embed\.max_tokens"):
        embedder(texts)


def test_the_table_has_active_latents_alone_by_id() -> None:
    ids, values = np.array([[3, 1, 2], [5, 6, 7]], np.int32), np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], np.float16)
    rows = _table(np.array([9, 8], np.int32), np.array([0.5, 1.0], np.float32), ids, values).to_pylist()
    assert rows[0] == {"num_tokens": 9, "fvu": 0.5, "latent_ids": [1, 3], "latent_values": [1.0, 2.0]}
    assert rows[1] == {"num_tokens": 8, "fvu": 1.0, "latent_ids": [], "latent_values": []}
