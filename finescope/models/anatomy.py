"""Where a family of models keeps its blocks, heads and MLP: a table, and a check of a model against it."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from finescope.errors import ModelError


@dataclass(frozen=True)
class Anatomy:
    """Module names of one family; those of a block are relative to the block."""

    family: str  # config.model_type
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def block_linears(self) -> tuple[str, ...]:
        """The linear maps of a block: what is pruned, and what LoRA adapts."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)


# Separate q, k, v projections, a gated MLP and no norm over all heads at once: pruning slices rows and columns only.
FAMILIES = {name: Anatomy(name) for name in ("llama", "mistral", "qwen2", "qwen3")}

# What may stand in a block beside its linear maps without being touched by pruning (norms over head_dim or d_model).
_UNTOUCHED = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "mlp.act_fn"}


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of `model`, checked module by module (weights may be on the meta device).

    Raises:
        ModelError: the family is not in the table, or a module is missing or not recognised; the message names it.
    """
    family = str(getattr(model.config, "model_type", type(model).__name__))
    if family not in FAMILIES:
        raise ModelError(
            f"model family '{family}' ({type(model).__name__}) is not recognised; known families: "
            f"{', '.join(FAMILIES)}. First block: {_first_block_modules(model)}"
        )
    anatomy = FAMILIES[family]
    for name in (anatomy.blocks, anatomy.embedding, anatomy.final_norm):
        _module(model, name, family)
    for index, block in enumerate(blocks_of(model, anatomy)):
        prefix = f"{anatomy.blocks}.{index}"
        for name in anatomy.block_linears:
            if not isinstance(_module(block, name, family, prefix), nn.Linear):
                raise ModelError(f"module '{prefix}.{name}' of family '{family}' is not a linear layer")
        for name, module in block.named_modules():
            leaf = name and not any(True for _ in module.children())
            if leaf and name not in anatomy.block_linears and name not in _UNTOUCHED:
                raise ModelError(f"module '{prefix}.{name}' ({type(module).__name__}) of family '{family}' is not recognised")
    return anatomy


def blocks_of(model: PreTrainedModel, anatomy: Anatomy) -> list[nn.Module]:
    """The decoder blocks in order."""
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def block_parameters(model: PreTrainedModel, anatomy: Anatomy) -> int:
    """Parameters of the decoder blocks: what `prune.ratio` is a share of."""
    return sum(p.numel() for block in blocks_of(model, anatomy) for p in block.parameters())


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear map `name` of a block."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear), name
    return module


def _module(root: nn.Module, name: str, family: str, prefix: str = "") -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError:
        full = f"{prefix}.{name}" if prefix else name
        raise ModelError(f"module '{full}', expected in family '{family}', is missing") from None


def _first_block_modules(model: PreTrainedModel) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            inner = ", ".join(sub for sub, part in module[0].named_modules() if sub and not any(True for _ in part.children()))
            return f"{name}.0 = {type(module[0]).__name__}({inner})"
    return "no list of blocks found"
