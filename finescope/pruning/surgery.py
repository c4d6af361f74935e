"""Surgery: the kept groups as a stock Hugging Face model of its own, block by block."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from finescope.errors import ModelError
from finescope.models.anatomy import Anatomy, blocks_of
from finescope.models.blocks import adopt_rest
from finescope.models.groups import Layout, settings_of
from finescope.models.resize import resized
from finescope.pruning.groups import Kept, places_of, take


class Surgery:
    """Makes a student's blocks of a dense model's."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, layout: Layout, kept: Kept) -> None:
        """Begin with a student whose blocks are on the meta device; all else it shares with `model`.

        The class is that of `model`, but for a Llama whose new head count does not divide `hidden_size`: its configuration class
        refuses that, so the student is a Mistral without sliding window, which computes the same logits to the last bit.

        Raises:
            ModelError: the model's class is not a stock one.
        """
        if not type(model).__module__.startswith("transformers."):
            raise ModelError(
                f"{type(model).__name__} is not a class of transformers: a pruned model must load without extra code"
            )
        config = resized(model.config, settings_of(layout, [indices.shape[-1] for indices in kept]))
        assert config is not None, "only numbers that a stock class accepts are allowed"
        own = type(config) is type(model.config)
        student_class: Any = type(model) if own else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            student = student_class._from_config(
                config, dtype=model.dtype, attn_implementation=getattr(model.config, "_attn_implementation", None)
            )
        adopt_rest(student, model, anatomy)
        student.generation_config = copy.deepcopy(model.generation_config)
        self.student: PreTrainedModel = student.eval()
        self.layout, self._kept, self._blocks = layout, kept, blocks_of(student, anatomy)

    @torch.no_grad()
    def cut(self, layer: int, dense: nn.Module) -> nn.Module:
        """The student's block `layer`, with copies of what it keeps of the dense one."""
        weights: dict[str, Tensor] = {}
        for place in places_of(self.layout, layer):
            name = place.cut.parameter
            whole = weights.get(name, dense.get_parameter(name))
            weights[name] = take(whole, place, self._kept[place.which][place.position]).contiguous()
        for name, value in dense.named_parameters():
            weights.setdefault(name, value.clone())
        block = self._blocks[layer]
        block.load_state_dict(weights, strict=True, assign=True)
        return block.requires_grad_(False)
