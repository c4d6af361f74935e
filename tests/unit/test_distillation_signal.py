"""The teacher's stored log-probabilities against a softmax over the whole vocabulary, one document at a time, in float64."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from distillation_fixtures import tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

from finescope import schemas
from finescope.distillation import signal
from finescope.distillation.examples import build_examples
from finescope.distillation.signal import TeacherScorer
from finescope.errors import ModelError

VOCABULARY, MAX_TOKENS = 259, 40
LEAST = -65504.0
# Texts with and without a prompt; one is cut, of one the prompt alone is too long, one has a single token.
PAIRS = [("1+1?", "two"), (None, "plain text"), (None, "x"), (None, "y" * 60), ("p" * 60, "never"), ("why", "so that it is")]


def rewrites(pairs: list[tuple[str | None, str]]) -> pa.Table:
    rows = [
        {"doc_id": f"d{at}", "prompt": prompt, "response_original": "", "response": response, "used": "rewrite", "reason": ""}
        for at, (prompt, response) in enumerate(pairs)
    ]
    return pa.Table.from_pylist(rows, schema=schemas.REWRITES)


def scored(model: LlamaForCausalLM, top_k: int = 5, temperature: float = 1.0, batch_tokens: int = 100) -> pa.Table:
    scorer = TeacherScorer(model, tiny_tokenizer(), VOCABULARY, MAX_TOKENS, top_k, temperature, batch_tokens)
    return scorer(rewrites(PAIRS))


def naive(model: LlamaForCausalLM, temperature: float) -> list[np.ndarray]:
    """The log-probabilities of all tokens at each position that is trained on, [targets, vocabulary], a document each."""
    built = build_examples(tiny_tokenizer(), PAIRS, MAX_TOKENS)
    found: list[np.ndarray] = []
    with torch.inference_mode():
        for example in built.examples:
            logits = model(input_ids=torch.tensor(example.tokens.astype(np.int64))[None]).logits[0, :, :VOCABULARY].double()
            found.append((logits / temperature).log_softmax(-1)[example.loss_start - 1 : -1].numpy())
    for row, _ in built.dropped:
        found.insert(row, np.empty((0, VOCABULARY)))
    return found


def expected(logprobs: np.ndarray, top_k: int) -> np.ndarray:
    """The `top_k` largest of each row, descending, and the logarithm of the sum of all others."""
    order = np.argsort(-logprobs, axis=-1)
    best, others = order[:, :top_k], np.take_along_axis(logprobs, order[:, top_k:], -1)
    tail = np.logaddexp.reduce(others, axis=-1, keepdims=True)
    return np.concatenate([np.take_along_axis(logprobs, best, -1), tail], -1)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (5, 1.0), (5, 3.0), (5, 0.5), (258, 1.0)])
def test_equals_a_softmax_over_the_whole_vocabulary(
    top_k: int, temperature: float, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "CHUNK_LOGITS", 7 * VOCABULARY)
    model = tiny_llama()
    table = scored(model, top_k, temperature, batch_tokens)
    assert table.schema == schemas.TEACHER_LOGPROBS
    assert table.column("doc_id").to_pylist() == [f"d{at}" for at in range(len(PAIRS))]
    for row, logprobs in zip(table.to_pylist(), naive(model, temperature), strict=True):
        assert row["targets"] == len(logprobs)
        ids = np.array(row["ids"], np.int64).reshape(row["targets"], top_k)
        values = np.array(row["logprobs"], np.float64).reshape(row["targets"], top_k + 1)
        wanted = expected(logprobs, top_k)
        np.testing.assert_allclose(values, wanted, rtol=2**-10, atol=1e-5)
        # Of nearly equal tokens either may come first, and either be the last.
        np.testing.assert_allclose(np.take_along_axis(logprobs, ids, -1), wanted[:, :-1], atol=1e-4)
        assert all(len(set(one)) == top_k for one in ids.tolist())


def test_positions_are_those_that_are_trained_on() -> None:
    # A token a byte. A text's first token is foretold by nobody; the end of the turn is trained on, cut ones have none.
    assert scored(tiny_llama()).column("targets").to_pylist() == [4, 9, 0, MAX_TOKENS - 1, 0, 14]


def test_a_document_that_is_dropped_has_no_position() -> None:
    dropped = scored(tiny_llama()).to_pylist()[2]
    assert dropped == {"doc_id": "d2", "targets": 0, "ids": [], "logprobs": []}


def test_a_sure_teacher_keeps_the_mass_of_all_others() -> None:
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(60.0)
    tails = np.concatenate([expected(logprobs, 1)[:, -1] for logprobs in naive(model, 1.0)])
    sure = tails < np.log(2.0**-25)  # 1 less the best token's probability is 0 in float32
    assert sure.any()
    found = np.concatenate([np.array(row["logprobs"], np.float64)[1::2] for row in scored(model, 1).to_pylist()])
    np.testing.assert_allclose(found[sure], tails[sure], rtol=2**-9)


def test_what_float16_cannot_hold_is_its_least_value() -> None:
    cold, all_of_them = scored(tiny_llama(), 5, 1e-5), scored(tiny_llama(), VOCABULARY)
    values = np.array(cold.column("logprobs").combine_chunks().flatten().to_pylist(), np.float64).reshape(-1, 6)
    assert np.isfinite(values).all()
    assert values.min() == LEAST
    nothing = np.array(all_of_them.column("logprobs").combine_chunks().flatten().to_pylist(), np.float64)
    assert (nothing.reshape(-1, VOCABULARY + 1)[:, -1] == LEAST).all(), "no token is left for the others"


def test_logits_beyond_the_vocabulary_are_no_tokens() -> None:
    padded, plain = tiny_llama(), scored(tiny_llama())
    padded.resize_token_embeddings(VOCABULARY + 13, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[VOCABULARY:] = 10.0
    assert scored(padded).equals(plain)


def test_a_family_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    model = tiny_llama()
    model.config.logits_scaling = 4.0
    with pytest.raises(ModelError, match="logits_scaling"):
        scored(model)
