import pytest
import torch
from sae_dictionaries import model_of

from finescope.errors import ModelError
from finescope.models import likelihood
from finescope.models.likelihood import check_logits, token_nll


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 64 * 5, 2**26])
def test_equals_the_family_own_logits(family: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_LOGIT_BYTES", chunk_bytes)
    model, ids = model_of(family), torch.arange(1, 13)[None]
    hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
    logits = model(input_ids=ids).logits[0, :-1].double()
    expected = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(token_nll(model, hidden, ids[0, 1:]).double(), expected, rtol=1e-5, atol=1e-5)


def test_no_token_has_no_likelihood() -> None:
    nothing = token_nll(model_of("llama"), torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64))
    assert nothing.shape == (0,)


def test_an_unknown_change_of_the_logits_is_refused() -> None:
    model = model_of("llama")
    model.config.logits_scaling = 4.0
    with pytest.raises(ModelError, match="logits_scaling"):
        check_logits(model)
