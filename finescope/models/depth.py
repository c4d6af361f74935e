"""A configuration of fewer blocks: the first ones, or any that stay."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from finescope.errors import RecipeError


def with_blocks(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """`config` of a model of the blocks `kept` alone: 0-based, ascending. What it lists a block is cut too."""
    settings: dict[str, Any] = config.to_dict()
    if settings.get("layer_types") is not None:
        settings["layer_types"] = [settings["layer_types"][layer] for layer in kept]
    if "mlp_only_layers" in settings:
        # Which blocks are dense follows from a step and a list; once a block has left only the list can say it.
        dense = {layer for layer in kept if layer in settings["mlp_only_layers"] or (layer + 1) % settings["decoder_sparse_step"]}
        settings |= {"mlp_only_layers": [at for at, layer in enumerate(kept) if layer in dense], "decoder_sparse_step": 1}
    # GPT-2 calls it n_layer.
    settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    return type(config).from_dict(settings)


def check_blocks_may_leave(config: PreTrainedConfig) -> None:
    """See that each block computes what it does wherever it stands.

    Raises:
        RecipeError: the model has one block, or its attention is scaled by the number of the block.
    """
    if config.num_hidden_layers == 1:
        raise RecipeError("prune.structure: no blocks can be removed from this model: it has one")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise RecipeError(
            "prune.structure: no blocks can be removed from this model: scale_attn_by_inverse_layer_idx divides the attention "
            "of each block by its number, and no configuration could keep that number; expected auto or a list without blocks"
        )
