"""Log-likelihood of tokens under a causal language model, in chunks: the logits of a batch never exist whole."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finescope.errors import ModelError

# Logits of so many bytes (float32) exist at a time: a batch of a 150,000-word vocabulary would need gigabytes.
_LOGIT_BYTES = 64 * 2**20
# Other ways in which families change their logits after the output embedding; none of them is in the table of anatomies.
_UNKNOWN_CHANGES = ("logit_scale", "logits_scaling")


@torch.no_grad()
def token_nll(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats, float32 [N], from last hidden states [N, d_model] (after the final norm), some at a time.

    Gemma 2's soft cap on the logits is applied.

    Raises:
        ModelError: as `check_logits`.
    """
    check_logits(model)
    chunk = max(1, _LOGIT_BYTES // (4 * int(model.config.get_text_config().vocab_size)))
    parts = [hidden.new_empty(0, dtype=torch.float32)]
    for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        parts.append(nn.functional.cross_entropy(logits_of(model, part).float(), target, reduction="none"))
    return torch.cat(parts)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [N, vocabulary] of last hidden states [N, d_model], in the model's own dtype, as its forward pass makes them."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module), "a causal language model has output embeddings"
    cap, logits = logit_cap(model), head(hidden)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_cap(model: PreTrainedModel) -> float | None:
    """c of Gemma 2's soft cap: logits z of the output embedding become c * tanh(z / c); None where there is none."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def check_logits(model: PreTrainedModel) -> None:
    """See that a model's logits are those of its output embedding, or capped.

    Raises:
        ModelError: the family changes its logits after the output embedding in a way that is not known here.
    """
    config = model.config.get_text_config()
    changes = [name for name in _UNKNOWN_CHANGES if getattr(config, name, None) not in (None, 1.0)]
    if changes:
        raise ModelError(f"likelihood of a '{config.model_type}' with {', '.join(changes)} is not supported")
