"""What `finescope check-model` tells of a model before anything runs."""

from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

from finescope.config import ModelSection
from finescope.errors import ModelError
from finescope.models.anatomy import Anatomy, anatomy_of, block_parameters, blocks_of, has_experts
from finescope.models.groups import Layout, layout_of
from finescope.models.hooks import HookPoint, Site, hook_width, module_path
from finescope.models.load import load_meta_model
from finescope.models.source import resolve


def describe(section: ModelSection) -> dict[str, Any]:
    """What `finescope check-model` shows; reads no weights (of a GGUF file: its metadata).

    Raises:
        ModelError: the model cannot be found or used; an architecture that is not recognised names the module.
    """
    source = resolve(section, "model.path")
    model = load_meta_model(source, trust_remote_code=section.trust_remote_code)
    anatomy = anatomy_of(model)
    config, blocks = model.config, blocks_of(model, anatomy)
    layout = layout_of(model, anatomy)
    prunable = _prunable(layout)
    return {
        "path": source.path,
        "kind": source.kind,
        "revision": source.revision,
        "fingerprint": source.fingerprint,
        "family": anatomy.family,
        "blocks": len(blocks),
        "d_model": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "mlp_width": _mlp_width(model, anatomy),
        "vocab_size": config.vocab_size,
        "tied_embeddings": bool(config.tie_word_embeddings),
        "parameters": model.num_parameters(),
        "block_parameters": block_parameters(model, anatomy),
        "capture": "yes, at the sites below",
        "prune": ", ".join(prunable),
        "sites": _sites(model, len(blocks)),
        "prunable": prunable,
        "not_prunable": {kind: why for kind, why in layout.refused.items() if kind != "experts" or anatomy.experts},
        "modules": _parameters(blocks),
    }


def _parameters(blocks: list[nn.Module]) -> dict[str, int]:
    """Parameters of each module of a block, over all blocks; together they are the parameters of the blocks."""
    counts: dict[str, int] = {}
    for block in blocks:
        for name, module in block.named_modules():
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            if own:
                counts[name] = counts.get(name, 0) + own
    return counts


def _prunable(layout: Layout) -> dict[str, int]:
    """Parameters of all groups of each kind that the model can lose; those of experts hold those of their channels."""
    counts: dict[str, int] = {}
    for groups in layout.groups:
        if groups.kind not in layout.refused:
            counts[groups.kind] = counts.get(groups.kind, 0) + len(groups.layers) * groups.rows * groups.number * groups.params
    return counts


def _sites(model: PreTrainedModel, num_layers: int) -> list[dict[str, Any]]:
    """Where activations can be read: site, the module in each block, input or output of it, width, and in which blocks."""
    rows = []
    for site in get_args(Site):
        found: dict[tuple[str, int], list[int]] = {}
        for layer in range(1, num_layers + 1):
            try:
                path, width = module_path(model, HookPoint(layer, site)), hook_width(model, HookPoint(layer, site))
            except ModelError:
                continue  # a mixture of experts has no `mlp_hidden`
            found.setdefault((path.replace(f".{layer - 1}", ".N", 1), width), []).append(layer)
        for (path, width), layers in found.items():
            reads = "input" if site == "mlp_hidden" else "output"
            rows.append({"site": site, "module": path, "reads": reads, "width": width, "layers": _ranges(layers)})
    return rows


def _ranges(layers: list[int]) -> str:
    """1, 2, 3, 5 as "1-3, 5"."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _mlp_width(model: PreTrainedModel, anatomy: Anatomy) -> int:
    """d_ff of the first block; in a mixture of experts that of one expert."""
    block = blocks_of(model, anatomy)[0]
    if not has_experts(block, anatomy):
        return hook_width(model, HookPoint(1, "mlp_hidden"))
    assert anatomy.experts is not None
    # [experts, d_model, d_ff] in transformers 5
    return block.get_submodule(anatomy.experts).get_parameter("down_proj").shape[2]
