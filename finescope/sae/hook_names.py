"""The names that other tools give to hook points: TransformerLens's, and paths of Hugging Face modules."""

import re

from finescope.errors import DictionaryError
from finescope.models.anatomy import FAMILIES
from finescope.models.hooks import HookPoint, Site

_LENS: dict[Site, str] = {
    "residual": "hook_resid_post",
    "attention": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "mlp_hidden": "mlp.hook_post",
}
_SITES: dict[str, Site] = {place: site for site, place in _LENS.items()}
_LENS_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
_LISTS = "|".join(sorted({anatomy.blocks.rpartition(".")[2] for anatomy in FAMILIES.values()}))  # h, layers
# What may stand before the list of blocks; a model that also sees has its text model in `language_model`.
_ROOTS = "|".join(sorted({anatomy.blocks.partition(".")[0] for anatomy in FAMILIES.values()} | {"language_model"}))
_MODULE_NAME = re.compile(rf"(?:(?:{_ROOTS})\.)*(?P<path>(?:{_LISTS})[._](?P<block>\d+)(?:\.(?P<inner>.+))?)")
# Modules of a block by what they return. None returns the value at mlp_hidden: it is what the down projection takes.
_OUTPUTS: dict[str, Site] = {
    **{name: "attention" for anatomy in FAMILIES.values() for name in (anatomy.attention, anatomy.output)},
    **{name: "mlp" for anatomy in FAMILIES.values() for name in (anatomy.mlp, anatomy.down)},
}


def lens_name(hook: HookPoint) -> str:
    """TransformerLens's name, which SAELens uses: `blocks.9.hook_resid_post` is `HookPoint(10)`."""
    return f"blocks.{hook.layer - 1}.{_LENS[hook.site]}"


def normed_outputs(model_type: str) -> bool:
    """Whether the family puts a norm between a sublayer's output and the stream (Gemma 2 and 3, OLMo-2).

    TransformerLens's `hook_attn_out` and `hook_mlp_out` stand after that norm, our sites `attention` and `mlp` before it.
    """
    return model_type in FAMILIES and "post_feedforward_layernorm" in FAMILIES[model_type].others


def module_name(hook: HookPoint, module: str) -> str:
    """The module as sparsify names it: relative to the base model, that is, without the first part of the path.

    Args:
        module: its path in the whole model, `model.layers.9.mlp`; or a name of another tool, then Llama's names are taken.

    Raises:
        DictionaryError: the site is the input of a module.
    """
    if hook.site == "mlp_hidden":
        raise DictionaryError("sparsify reads what a module returns; site mlp_hidden, the input of one, goes as sae-lens only")
    known = _MODULE_NAME.fullmatch(module)
    if known:
        return known["path"]
    return f"layers.{hook.layer - 1}" + {"residual": "", "attention": ".self_attn", "mlp": ".mlp"}[hook.site]


def hook_of(name: str) -> HookPoint | None:
    """The hook point that a TransformerLens name or a module path means; None where it is none of ours."""
    lens = _LENS_NAME.fullmatch(name)
    if lens:
        block, place = int(lens.group(1)), lens.group(2)
        if place == "hook_resid_pre" and block > 0:
            return HookPoint(block)
        return HookPoint(block + 1, _SITES[place]) if place in _SITES else None
    module = _MODULE_NAME.fullmatch(name)
    if module is None:
        return None
    block, inner = int(module["block"]), module["inner"]
    if inner is None:
        return HookPoint(block + 1)
    return HookPoint(block + 1, _OUTPUTS[inner]) if inner in _OUTPUTS else None


def require_hook(name: str, where: str) -> HookPoint:
    """`hook_of`, of a name that must be known; `where` says which file and field it stands in.

    Raises:
        DictionaryError: it is another place than our sites, or before any block.
    """
    hook = hook_of(name)
    if hook is None:
        lens = ", ".join(f"blocks.N.{place}" for place in (*_LENS.values(), "hook_resid_pre (N > 0)"))
        raise DictionaryError(
            f"{where}: hook point '{name}' is not known; expected {lens}, or the path of a block, its attention or its MLP "
            "such as layers.N, layers.N.self_attn, layers.N.mlp"
        )
    return hook
