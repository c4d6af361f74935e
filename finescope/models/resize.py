"""A configuration of other sizes, as a stock class that accepts it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import MistralConfig, PreTrainedConfig

# Keys of a Llama configuration that mean nothing to Mistral, or name the class that writes them.
_LLAMA_ONLY = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version")


def resized(config: PreTrainedConfig, settings: Mapping[str, int]) -> PreTrainedConfig | None:
    """`config` with other `settings`, in its own class or in one that computes the same; None where no class accepts them.

    A class is asked by reading the configuration as `from_pretrained` will: some refuse a number of heads that does not divide
    `hidden_size`, whatever the size of a head.
    """
    own = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(own, name, value)
    if _accepted(own):
        return own
    twin = _TWINS[config.model_type](own) if config.model_type in _TWINS else None
    return twin if twin is not None and _accepted(twin) else None


def _accepted(config: PreTrainedConfig) -> bool:
    try:
        type(config).from_dict(config.to_dict())
    except StrictDataclassClassValidationError:
        return False
    return True


def _mistral(llama: PreTrainedConfig) -> PreTrainedConfig | None:
    """Without a sliding window Mistral computes what a Llama without biases does, to the last bit, with any number of heads."""
    if getattr(llama, "attention_bias", False) or getattr(llama, "mlp_bias", False):
        return None
    fields: dict[str, Any] = {name: value for name, value in llama.to_dict().items() if name not in _LLAMA_ONLY}
    return MistralConfig(**fields, sliding_window=None)


_TWINS: dict[str, Callable[[PreTrainedConfig], PreTrainedConfig | None]] = {"llama": _mistral}
