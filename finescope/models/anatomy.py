"""Where a family of models keeps its blocks, heads and MLP: a table, and a check of a model against it."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finescope.errors import ModelError
from finescope.models import cuts
from finescope.models.cuts import Cut

# What a gated RMSNorm family has in a block beside its linear maps.
_NORMS = ("input_layernorm", "post_attention_layernorm")
_SANDWICH = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_ACTIVATION = ("mlp.act_fn",)
_EXPERTS = ("mlp.gate", "mlp.experts", "mlp.experts.act_fn")
_AFTER_ATTENTION, _AFTER_MLP = "post_attention_layernorm", "post_feedforward_layernorm"


@dataclass(frozen=True)
class Anatomy:
    """Module names of one family, relative to the block where they are of a block, and what pruning must know of it.

    `sizes` says which settings of the configuration hold the number of channels of a dense block, of channels of an expert and
    of experts, by the names `channels`, `expert_channels` and `experts`.
    """

    family: str  # config.model_type
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # or one fused map
    output: str = "self_attn.o_proj"  # the attention's output projection
    mlp: str = "mlp"
    expand: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # or one fused map, or up alone where there is no gate
    down: str = "mlp.down_proj"
    experts: str | None = None  # holds the 3-D weights of all experts; a block that has it has no `expand` and `down`
    router: str = "mlp.gate"  # of the experts
    others: tuple[str, ...] = _NORMS + _ACTIVATION  # what else may have parameters, or is a leaf
    stored_masks: tuple[str, ...] = ()  # ends of names that old checkpoints hold and today's code makes itself
    attention_norm: str | None = None  # what the attention's output goes through before it is added to the stream
    mlp_norm: str | None = None  # the same of the MLP's
    cuts: tuple[Cut, ...] = cuts.SEPARATE_HEADS + cuts.GATED_MLP  # what leaves with which group
    sizes: tuple[tuple[str, str], ...] = (("channels", "intermediate_size"),)
    fixed_heads: str = ""  # why heads cannot be removed, where no configuration could say it

    @property
    def decoder(self) -> str:
        """The module from token ids or input embeddings to the final norm's output."""
        return self.blocks.rpartition(".")[0]

    @property
    def block_linears(self) -> tuple[str, ...]:
        """The linear maps that every block has: what is pruned, and what LoRA adapts.

        In a family with experts those are the attention's alone, though some of its blocks may be dense.
        """
        attention = (*self.qkv, self.output)
        return attention if self.experts else (*attention, *self.expand, self.down)


def _mixture(family: str, others: tuple[str, ...], dense_mlp: tuple[Cut, ...], **sizes: str) -> Anatomy:
    table = cuts.SEPARATE_HEADS + dense_mlp + cuts.EXPERTS
    return Anatomy(family, experts="mlp.experts", others=others + _EXPERTS, cuts=table, sizes=tuple(sizes.items()))


_TABLE = (
    Anatomy("llama"),
    Anatomy("mistral"),
    Anatomy("qwen2"),
    Anatomy("qwen3", others=_NORMS + _ACTIVATION + _HEAD_NORMS),
    Anatomy("gemma2", others=_SANDWICH + _ACTIVATION, attention_norm=_AFTER_ATTENTION, mlp_norm=_AFTER_MLP),
    Anatomy("gemma3_text", others=_SANDWICH + _ACTIVATION + _HEAD_NORMS, attention_norm=_AFTER_ATTENTION, mlp_norm=_AFTER_MLP),
    Anatomy(
        "phi3",
        qkv=("self_attn.qkv_proj",),
        expand=("mlp.gate_up_proj",),
        others=(*_NORMS, "mlp.activation_fn", "resid_attn_dropout", "resid_mlp_dropout"),
        cuts=cuts.FUSED_HEADS + cuts.FUSED_GATED_MLP,
    ),
    Anatomy(
        "olmo2",
        others=(_AFTER_ATTENTION, _AFTER_MLP, *_ACTIVATION, *_HEAD_NORMS),
        attention_norm=_AFTER_ATTENTION,
        mlp_norm=_AFTER_MLP,
        cuts=cuts.SEPARATE_HEADS + cuts.NORMS_OVER_HEADS + cuts.GATED_MLP,
    ),
    Anatomy(
        "gpt2",
        blocks="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        attention="attn",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        expand=("mlp.c_fc",),
        down="mlp.c_proj",
        others=("ln_1", "ln_2", "attn.attn_dropout", "attn.resid_dropout", "mlp.act", "mlp.dropout"),
        stored_masks=(".attn.masked_bias",),
        cuts=cuts.GPT2_MLP,
        sizes=(("channels", "n_inner"),),
        fixed_heads="GPT-2 takes n_embd / n_head for the size of a head",
    ),
    Anatomy(
        "gpt_neox",
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        qkv=("attention.query_key_value",),
        output="attention.dense",
        expand=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        others=(*_NORMS, "mlp.act", "post_attention_dropout", "post_mlp_dropout"),
        cuts=cuts.GPT_NEOX_MLP,
        fixed_heads="it takes hidden_size / num_attention_heads for their size",
    ),
    _mixture("mixtral", _NORMS, (), expert_channels="intermediate_size", experts="num_local_experts"),
    _mixture(
        "qwen3_moe",
        _NORMS + _ACTIVATION + _HEAD_NORMS,
        cuts.GATED_MLP,
        channels="intermediate_size",
        expert_channels="moe_intermediate_size",
        experts="num_experts",
    ),
)
FAMILIES = {anatomy.family: anatomy for anatomy in _TABLE}


def family_of(model: PreTrainedModel) -> Anatomy:
    """The table's entry for `model`, whose modules are taken to be as they were when it was loaded.

    Raises:
        ModelError: the family is not in the table.
    """
    family = str(getattr(model.config, "model_type", type(model).__name__))
    if family not in FAMILIES:
        raise ModelError(
            f"model family '{family}' ({type(model).__name__}) is not recognised; known families: "
            f"{', '.join(FAMILIES)}. First block: {_first_block_modules(model)}"
        )
    return FAMILIES[family]


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """The anatomy of `model`, checked module by module (weights may be on the meta device).

    Raises:
        ModelError: the family is not in the table, or a module is missing or not recognised; the message names it.
    """
    anatomy = family_of(model)
    for name in (anatomy.blocks, anatomy.embedding, anatomy.final_norm):
        _module(model, name, anatomy.family)
    for index, block in enumerate(blocks_of(model, anatomy)):
        _check_block(block, anatomy, f"{anatomy.blocks}.{index}")
    return anatomy


def blocks_of(model: PreTrainedModel, anatomy: Anatomy) -> list[nn.Module]:
    """The decoder blocks in order."""
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def block_parameters(model: PreTrainedModel, anatomy: Anatomy) -> int:
    """Parameters of the decoder blocks: what `prune.ratio` is a share of."""
    return sum(p.numel() for block in blocks_of(model, anatomy) for p in block.parameters())


def linear_map(block: nn.Module, name: str) -> nn.Linear | Conv1D:
    """The linear map `name` of a block."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear | Conv1D), name
    return module


def input_width(module: nn.Module) -> int:
    """Inputs of a linear map; GPT-2's Conv1D keeps its weight as [in, out]."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0]
    assert isinstance(module, nn.Linear), type(module)
    return module.in_features


def has_experts(block: nn.Module, anatomy: Anatomy) -> bool:
    """Whether the MLP of this block is a mixture of experts; a family may have both kinds of blocks."""
    return anatomy.experts is not None and any(name == anatomy.experts for name, _ in block.named_modules())


def linears_of(block: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """The linear maps of this very block: of a mixture of experts only the attention's are modules of their own."""
    attention = (*anatomy.qkv, anatomy.output)
    return attention if has_experts(block, anatomy) else (*attention, *anatomy.expand, anatomy.down)


def _check_block(block: nn.Module, anatomy: Anatomy, prefix: str) -> None:
    linears = linears_of(block, anatomy)
    for name in (anatomy.attention, anatomy.mlp):
        _module(block, name, anatomy.family, prefix)
    for name in linears:
        if not isinstance(_module(block, name, anatomy.family, prefix), nn.Linear | Conv1D):
            raise ModelError(f"module '{prefix}.{name}' of family '{anatomy.family}' is not a linear layer")
    for name, module in block.named_modules():
        leaf = not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))
        if name and leaf and name not in linears and name not in anatomy.others:
            kind = type(module).__name__
            raise ModelError(f"module '{prefix}.{name}' ({kind}) of family '{anatomy.family}' is not recognised")


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
