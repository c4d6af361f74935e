"""Surgery: the kept groups as a stock Hugging Face model of its own."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from finescope.errors import ModelError
from finescope.models.anatomy import Anatomy, blocks_of
from finescope.pruning.allocation import Kept
from finescope.pruning.groups import Groups, group_indices, group_slices

# Keys of a Llama configuration that mean nothing to Mistral, or name the class that writes them.
_LLAMA_ONLY = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version")


def cut(model: PreTrainedModel, anatomy: Anatomy, groups: Groups, kept: Kept) -> PreTrainedModel:
    """A new model with the kept groups only; shares no memory with `model`, keeps every tensor's dtype and device.

    The class is that of `model`, but for a Llama whose new head count does not divide `hidden_size`: its configuration class
    refuses that, so the student is a Mistral without sliding window, which computes the same logits to the last bit.

    Raises:
        ModelError: the model's class is not a stock one, or no stock class holds the student.
    """
    if not type(model).__module__.startswith("transformers."):
        raise ModelError(f"{type(model).__name__} is not a class of transformers: a pruned model must load without extra code")
    assert len({len(indices) for indices in kept.heads}) == len({len(indices) for indices in kept.mlp}) == 1
    config = student_config(model.config, groups, len(kept.heads[0]), len(kept.mlp[0]))
    student_class: Any = MistralForCausalLM if isinstance(config, MistralConfig) else type(model)
    with no_init_weights():
        student = student_class._from_config(
            config, dtype=model.dtype, attn_implementation=getattr(model.config, "_attn_implementation", None)
        )
    student.to(model.device)
    student.load_state_dict(_kept_weights(model, anatomy, groups, kept), strict=True, assign=True)
    student.tie_weights()
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def student_config(config: PreTrainedConfig, groups: Groups, num_kv_heads: int, num_channels: int) -> PreTrainedConfig:
    """The student's configuration. `head_dim` is written out: it no longer follows from the head count.

    Raises:
        ModelError: the head count does not divide `hidden_size` and the Llama has biases, which Mistral lacks.
    """
    num_heads = num_kv_heads * groups.queries_per_kv
    sizes: dict[str, Any] = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": groups.head_dim,
        "intermediate_size": num_channels,
    }
    if config.model_type == "llama" and groups.d_model % num_heads:
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            raise ModelError(
                f"a Llama with biases cannot have {num_heads} heads: they do not divide hidden_size {groups.d_model}, and "
                "Mistral, which accepts that, has no biases; set prune.structure to [mlp] or another prune.ratio"
            )
        fields: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key not in _LLAMA_ONLY}
        fields |= sizes
        return MistralConfig(**fields, sliding_window=None)
    student = copy.deepcopy(config)
    for key, value in sizes.items():
        setattr(student, key, value)
    return student


@torch.no_grad()
def _kept_weights(model: PreTrainedModel, anatomy: Anatomy, groups: Groups, kept: Kept) -> dict[str, Tensor]:
    """The student's state dict: copies, one for weights that are tied."""
    sliced: dict[str, Tensor] = {}
    for layer, block in enumerate(blocks_of(model, anatomy)):
        for part in group_slices(anatomy, groups):
            indices = torch.from_numpy(getattr(kept, part.kind)[layer]).to(model.device)
            rows = group_indices(indices, part.width)
            for name, parameter in block.get_submodule(part.name).named_parameters():
                if name == "weight":
                    value = parameter.index_select(part.axis, rows)
                else:
                    value = parameter[rows] if part.axis == 0 else parameter.clone()
                sliced[f"{anatomy.blocks}.{layer}.{part.name}.{name}"] = value.contiguous()
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        state[name] = sliced[name] if name in sliced else copies.setdefault(id(value), value.detach().clone())
    return state
