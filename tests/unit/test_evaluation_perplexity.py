import math

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from finescope.corpus.tokenise import pad_batch
from finescope.errors import ModelError
from finescope.evaluation.perplexity import perplexity, perplexity_of_documents
from finescope.models import likelihood


def _documents(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, 64, size=length).astype(np.int32) for length in lengths]


def _naive(model: torch.nn.Module, document: np.ndarray) -> float:
    """Sum of -log p of tokens 1.. of one document, from full logits, a token at a time."""
    ids = torch.from_numpy(document).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    return -sum(float(logits[t - 1].log_softmax(-1)[ids[0, t]]) for t in range(1, ids.shape[1]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 64 * 5, 2**20])
def test_equals_the_naive_loss(family: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_LOGIT_BYTES", chunk_bytes)
    model = tiny_model(family)
    documents = _documents(7, 2, 1, 12, 5)
    done: list[int] = []
    measured = perplexity(model, [pad_batch(documents[:3], 0), pad_batch(documents[3:], 0)], done.append)
    expected = [_naive(model, document) for document in documents]
    np.testing.assert_allclose(measured.nll, expected, rtol=1e-5)
    assert measured.tokens.tolist() == [6, 1, 0, 11, 4]
    assert measured.num_tokens == 22
    assert measured.value == pytest.approx(math.exp(sum(expected) / 22), rel=1e-5)
    assert done == [3, 2]


def test_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert perplexity(model, [pad_batch(_documents(9, 4), 0)], lambda _: None).value == pytest.approx(64.0, rel=1e-6)


def test_documents_come_back_in_their_order_whatever_the_batches() -> None:
    model = tiny_model("llama")
    documents = _documents(3, 9, 1, 6, 9, 2)
    small = perplexity_of_documents(model, documents, 10, 0, lambda _: None)
    large = perplexity_of_documents(model, documents, 10_000, 0, lambda _: None)
    np.testing.assert_allclose(small.nll, large.nll, rtol=1e-5)
    np.testing.assert_allclose(small.nll, [_naive(model, document) for document in documents], rtol=1e-5)
    assert small.tokens.tolist() == [2, 8, 0, 5, 8, 1]


def test_training_mode_is_left_as_it_was_and_dropout_is_off() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, vocab_size=64, attention_dropout=0.5
    )
    model = LlamaForCausalLM(config).train()
    batch = [pad_batch(_documents(9), 0)]
    assert perplexity(model, batch, lambda _: None).value == perplexity(model, batch, lambda _: None).value
    assert model.training


def test_nothing_to_predict_and_a_ruined_model() -> None:
    model = tiny_model("llama")
    assert math.isnan(perplexity(model, [], lambda _: None).value)
    assert math.isnan(perplexity_of_documents(model, _documents(1, 1), 8, 0, lambda _: None).value)
    model.get_output_embeddings().weight.data *= 1e5
    assert perplexity(model, [pad_batch(_documents(9), 0)], lambda _: None).value == math.inf


def test_a_family_with_other_logits_is_refused() -> None:
    model = tiny_model("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(ModelError, match="logit_scale"):
        perplexity(model, [], lambda _: None)


def test_padding_on_the_left_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="right"):
        perplexity(tiny_model("llama"), [(np.array([[0, 5]]), np.array([[0, 1]]))], lambda _: None)
