"""Surgery: the kept groups as a stock Hugging Face model of its own."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from finescope.errors import ModelError
from finescope.models.anatomy import Anatomy, blocks_of
from finescope.models.depth import with_blocks
from finescope.models.groups import Layout, settings_of
from finescope.models.resize import resized
from finescope.pruning.groups import Kept, places_of, take


def cut(model: PreTrainedModel, anatomy: Anatomy, layout: Layout, kept: Kept) -> PreTrainedModel:
    """A new model with the kept groups only; shares no memory with `model`, keeps every tensor's dtype and device.

    The class is that of `model`, but for a Llama whose new head count does not divide `hidden_size`: its configuration class
    refuses that, so the student is a Mistral without sliding window, which computes the same logits to the last bit.

    Raises:
        ModelError: the model's class is not a stock one.
    """
    if not type(model).__module__.startswith("transformers."):
        raise ModelError(f"{type(model).__name__} is not a class of transformers: a pruned model must load without extra code")
    config = resized(model.config, settings_of(layout, [indices.shape[-1] for indices in kept]))
    assert config is not None, "only numbers that a stock class accepts are allowed"
    student = _assembled(model, config, _kept_weights(model, anatomy, layout, kept))
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def without_blocks(model: PreTrainedModel, anatomy: Anatomy, kept: Sequence[int]) -> PreTrainedModel:
    """The blocks `kept` (0-based, ascending) as a model of the same class, whose weights are the memory of `model`'s."""
    places = {layer: place for place, layer in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        layer, _, rest = name.removeprefix(f"{anatomy.blocks}.").partition(".")
        if not name.startswith(f"{anatomy.blocks}."):
            state[name] = value.detach()
        elif int(layer) in places:
            state[f"{anatomy.blocks}.{places[int(layer)]}.{rest}"] = value.detach()
    shallower = _assembled(model, with_blocks(model.config, kept), state)
    shallower.generation_config = model.generation_config
    return shallower


def _assembled(model: PreTrainedModel, config: PreTrainedConfig, state: dict[str, Tensor]) -> PreTrainedModel:
    """A stock model of `config` that holds the very tensors of `state`, on the device and in the dtype of `model`."""
    own = type(config) is type(model.config)
    student_class: Any = type(model) if own else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with no_init_weights():
        student = student_class._from_config(
            config, dtype=model.dtype, attn_implementation=getattr(model.config, "_attn_implementation", None)
        )
    student.to(model.device)
    student.load_state_dict(state, strict=True, assign=True)
    student.tie_weights()
    return student.eval()


@torch.no_grad()
def _kept_weights(model: PreTrainedModel, anatomy: Anatomy, layout: Layout, kept: Kept) -> dict[str, Tensor]:
    """The student's state dict: copies, one for weights that are tied."""
    smaller: dict[str, Tensor] = {}
    for layer, block in enumerate(blocks_of(model, anatomy)):
        for place in places_of(layout, layer):
            name = f"{anatomy.blocks}.{layer}.{place.cut.parameter}"
            whole = smaller.get(name, block.get_parameter(place.cut.parameter).detach())
            smaller[name] = take(whole, place, kept[place.which][place.position]).contiguous()
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        state[name] = smaller[name] if name in smaller else copies.setdefault(id(value), value.detach().clone())
    return state
