"""Which rows or columns of a block's parameters belong to which groups: the tables that importance, surgery and re-fit read."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

# heads: a key/value head with its query heads; where all query heads share one key/value head, a query head.
# mlp: a channel of the MLP, or of one expert. experts: a whole expert.
Kind = Literal["heads", "mlp", "experts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What lies along an axis. Each part is divided evenly among the groups, in their order.
Part = Literal["query", "key", "value", "channel", "expert"]


@dataclass(frozen=True)
class Cut:
    """Where one parameter keeps its share of the groups of a kind."""

    kind: Kind
    parameter: str  # relative to the block; a block that does not have it (a bias, an expert) is not cut there
    axis: int
    parts: tuple[Part, ...]  # along the axis, one after another: more than one where maps are fused
    by_expert: bool = False  # axis 0 counts the experts, and each has groups of its own
    scored: bool = True  # whether the parameter counts in the importance of its groups


def cuts_of(block: nn.Module, table: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """The cuts of this very block; of one parameter those by expert come before the one that takes experts away."""
    present = {name for name, _ in block.named_parameters()}
    return tuple(sorted((cut for cut in table if cut.parameter in present), key=lambda cut: not cut.by_expert))


def _made_by(kind: Kind, module: str, *parts: Part, axis: int = 0) -> tuple[Cut, ...]:
    """The outputs of a linear map, or of a norm, are divided among the groups: rows and their biases. Conv1D: axis 1."""
    return (Cut(kind, f"{module}.weight", axis, parts), Cut(kind, f"{module}.bias", 0, parts))


def _read_by(kind: Kind, module: str, part: Part, axis: int = 1) -> tuple[Cut, ...]:
    """The inputs of a map are: columns. Its bias is of no group: it is added once, whatever is removed. Conv1D: axis 0."""
    return (Cut(kind, f"{module}.weight", axis, (part,)),)


_OUTPUT = _read_by("heads", "self_attn.o_proj", "query")
_DOWN = _read_by("mlp", "mlp.down_proj", "channel")

SEPARATE_HEADS = (
    *_made_by("heads", "self_attn.q_proj", "query"),
    *_made_by("heads", "self_attn.k_proj", "key"),
    *_made_by("heads", "self_attn.v_proj", "value"),
    *_OUTPUT,
)
FUSED_HEADS = (*_made_by("heads", "self_attn.qkv_proj", "query", "key", "value"), *_OUTPUT)
# Norms over all heads at once have a weight for each row of query and key. Norms over one head are the same for all.
NORMS_OVER_HEADS = (*_made_by("heads", "self_attn.q_norm", "query"), *_made_by("heads", "self_attn.k_norm", "key"))

GATED_MLP = (*_made_by("mlp", "mlp.gate_proj", "channel"), *_made_by("mlp", "mlp.up_proj", "channel"), *_DOWN)
FUSED_GATED_MLP = (*_made_by("mlp", "mlp.gate_up_proj", "channel", "channel"), *_DOWN)
GPT2_MLP = (*_made_by("mlp", "mlp.c_fc", "channel", axis=1), *_read_by("mlp", "mlp.c_proj", "channel", axis=0))
GPT_NEOX_MLP = (*_made_by("mlp", "mlp.dense_h_to_4h", "channel"), *_read_by("mlp", "mlp.dense_4h_to_h", "channel"))
EXPERTS = (
    # [experts, gate and up channels, d_model] and [experts, d_model, channels]
    Cut("mlp", "mlp.experts.gate_up_proj", 1, ("channel", "channel"), by_expert=True),
    Cut("mlp", "mlp.experts.down_proj", 2, ("channel",), by_expert=True),
    Cut("experts", "mlp.experts.gate_up_proj", 0, ("expert",)),
    Cut("experts", "mlp.experts.down_proj", 0, ("expert",)),
    # Without its row an expert cannot be chosen; a row of zeros could be. So |w * dL/dw| of it says nothing of removing it.
    Cut("experts", "mlp.gate.weight", 0, ("expert",), scored=False),
)
