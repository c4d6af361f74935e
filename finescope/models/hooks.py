"""Where activations are read and written: the residual stream after a block, and the sublayers' outputs inside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from finescope.errors import ModelError
from finescope.models.anatomy import blocks_of, family_of, has_experts, input_width

# residual: the stream after the block, as the next block (or, after the last one, the final norm) gets it: [B, T, d_model].
# attention: what the attention's output projection returns, its bias included, before any norm that follows it (Gemma,
#   OLMo-2) and before it is added to the stream: [B, T, d_model].
# mlp: the same of the MLP, or of the mixture of experts: [B, T, d_model].
# mlp_hidden: the input of the MLP's down projection: [B, T, d_ff]. A mixture of experts has none.
Site = Literal["residual", "attention", "mlp", "mlp_hidden"]


@dataclass(frozen=True)
class HookPoint:
    """A place in the model."""

    layer: int  # 1-based: in, or after, decoder block `layer`
    site: Site = "residual"


def module_path(model: PreTrainedModel, hook: HookPoint) -> str:
    """The module whose output is the value at `hook`; of `mlp_hidden`, the module whose input it is.

    Raises:
        ModelError: the model has no such block, or the block no such site.
    """
    anatomy = family_of(model)
    blocks = blocks_of(model, anatomy)
    if not 1 <= hook.layer <= len(blocks):
        raise ModelError(f"layer {hook.layer}: the model has blocks 1 to {len(blocks)}")
    prefix = f"{anatomy.blocks}.{hook.layer - 1}"
    if hook.site == "residual":
        return prefix
    if hook.site == "mlp_hidden" and has_experts(blocks[hook.layer - 1], anatomy):
        raise ModelError(f"site mlp_hidden: block {hook.layer} of family '{anatomy.family}' is a mixture of experts")
    inner = {"attention": anatomy.output, "mlp": anatomy.mlp, "mlp_hidden": anatomy.down}
    return f"{prefix}.{inner[hook.site]}"


def hook_width(model: PreTrainedModel, hook: HookPoint) -> int:
    """Size of the last dimension of the value at `hook`.

    Raises:
        ModelError: as `module_path`.
    """
    path = module_path(model, hook)
    if hook.site == "mlp_hidden":
        return input_width(model.get_submodule(path))
    embedding = model.get_submodule(family_of(model).embedding)
    assert isinstance(embedding, nn.Embedding)
    return embedding.embedding_dim


def capture(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, hooks: Sequence[HookPoint]) -> list[Tensor]:
    """The values at `hooks`, in their order, of one forward pass that ends where the last of them has been read.

    Neither the blocks after it, nor the final norm, nor the head is run. What saves memory and reading is loading the
    model with `num_layers`.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 where there is a token, padded on either side.

    Returns:
        [B, T, width] each, in the model's dtype; what stands at padding means nothing.

    Raises:
        ModelError: as `module_path`.
    """
    with torch.no_grad():
        return _values(model, hooks, {"input_ids": input_ids, "attention_mask": attention_mask})


def values_of_embeddings(model: PreTrainedModel, embeddings: Tensor, attention_mask: Tensor, hook: HookPoint) -> Tensor:
    """`capture` of one hook point as a differentiable function of the input embeddings, in reverse and forward mode.

    Forward mode (`torch.func.jvp`) needs attention without fused kernels: `sdpa_kernel(SDPBackend.MATH)`, or a model that
    was loaded with `attention="eager"`.

    Args:
        embeddings: [B, T, d_model], what `model.get_input_embeddings()` returns of token ids. Gemma's scale is in it
            already; GPT-2's position embeddings are added inside.

    Returns:
        [B, T, width].
    """
    with _differentiable_experts(model):
        return _values(model, (hook,), {"inputs_embeds": embeddings, "attention_mask": attention_mask})[0]


@contextmanager
def spliced(model: PreTrainedModel, hook: HookPoint, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the context lasts, every forward pass goes on with `replace(value)` instead of the value at `hook`.

    `replace` maps [B, T, width] to the same shape.

    Raises:
        ModelError: as `module_path`.
    """

    def change(value: Tensor) -> Tensor:
        changed = replace(value)
        assert changed.shape == value.shape, f"{hook}: {tuple(changed.shape)} for {tuple(value.shape)}"
        return changed

    handle = _on_value(model, hook, change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _differentiable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Run a mixture of experts one expert at a time: the grouped product has no forward-mode rule."""
    if family_of(model).experts is None:
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


class _Reached(Exception):
    """Leaves the forward pass where nothing of it is needed any more."""


def _values(model: PreTrainedModel, hooks: Sequence[HookPoint], inputs: dict[str, Tensor]) -> list[Tensor]:
    wanted = set(hooks)
    caught: dict[HookPoint, Tensor] = {}

    def keep(hook: HookPoint) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            caught[hook] = value
            if len(caught) == len(wanted):
                raise _Reached

        return read

    if not wanted:
        return []
    with ExitStack() as stack:
        for hook in wanted:
            stack.callback(_on_value(model, hook, keep(hook)).remove)
        try:
            model.get_submodule(family_of(model).decoder)(**inputs, use_cache=False)
        except _Reached:
            return [caught[hook] for hook in hooks]
    raise AssertionError(f"never reached: {wanted - caught.keys()}")


def _on_value(model: PreTrainedModel, hook: HookPoint, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Show each value at `hook` to `see`; what it returns, if anything, goes on in its place."""
    module = model.get_submodule(module_path(model, hook))
    if hook.site == "mlp_hidden":

        def before(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = see(arguments[0])
            return None if changed is None else (changed, *arguments[1:])

        return module.register_forward_pre_hook(before)

    def after(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        # Blocks returned tuples before transformers made them return the stream alone, and remote code still does.
        if isinstance(output, tuple):
            changed = see(output[0])
            return None if changed is None else (changed, *output[1:])
        return see(output)

    return module.register_forward_hook(after)
