"""What `finescope check-model` tells of a model before anything runs."""

from typing import Any

from finescope.config import ModelSection
from finescope.models.anatomy import anatomy_of, block_parameters, blocks_of
from finescope.models.load import load_meta_model
from finescope.models.source import resolve


def describe(section: ModelSection) -> dict[str, Any]:
    """What `finescope check-model` shows; reads no weights (of a GGUF file: its metadata).

    Raises:
        ModelError: the model cannot be found or used; an architecture that is not recognised names the module.
    """
    source = resolve(section)
    model = load_meta_model(source, trust_remote_code=section.trust_remote_code)
    anatomy = anatomy_of(model)
    config = model.config
    parameters = dict.fromkeys(anatomy.block_linears, 0)
    for block in blocks_of(model, anatomy):
        for name in parameters:
            parameters[name] += sum(p.numel() for p in block.get_submodule(name).parameters())
    mlp = (anatomy.gate, anatomy.up, anatomy.down)
    return {
        "path": source.path,
        "kind": source.kind,
        "revision": source.revision,
        "fingerprint": source.fingerprint,
        "family": anatomy.family,
        "blocks": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "tied_embeddings": bool(config.tie_word_embeddings),
        "parameters": model.num_parameters(),
        "block_parameters": block_parameters(model, anatomy),
        "prunable": {
            "heads": sum(count for name, count in parameters.items() if name not in mlp),
            "mlp": sum(parameters[name] for name in mlp),
        },
        "modules": parameters,
    }
