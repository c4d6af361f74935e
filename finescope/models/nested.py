"""Text models inside multimodal checkpoints: only the text model is built, and only its weights are read."""

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Nested:
    """How a multimodal family keeps its text model, which is a family of its own."""

    key_mapping: dict[str, str]  # patterns of names in the checkpoint, and what they are called in the text model alone
    left_out: tuple[str, ...]  # beginnings of the names of all other weights


NESTED = {
    # Gemma 3 from 4B up. Checkpoints on the hub have the first layout; `model.language_model.` is that of the classes.
    "gemma3": Nested(
        {r"^language_model\.lm_head\.": "lm_head.", r"^(model\.)?language_model\.(model\.)?": "model."},
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    )
}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text model: `config` itself where it is one."""
    if config.model_type not in NESTED:
        return config
    text = config.get_text_config()
    text.dtype = text.dtype or config.dtype
    return text
