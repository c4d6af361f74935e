"""The residual stream block by block: the calibration set's hidden states, one block's at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finescope.models.anatomy import Anatomy, blocks_of, linear
from finescope.pruning.importance import Batch


class Stream(NamedTuple):
    """The hidden states before some block, and what each block must be called with."""

    hidden: list[Tensor]  # a batch: [documents, tokens, d_model]; the caller replaces it block by block
    arguments: list[list[dict[str, Any]]]  # a layer, a batch: the keyword arguments of the block (masks, positions)


class _Reached(Exception):
    """Leaves a block's forward pass where the module of interest is called."""


@torch.no_grad()
def open_stream(model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Batch]) -> Stream:
    """The stream before the first block, and every block's arguments, as the model itself makes them.

    The model's own forward pass runs with blocks that only note their arguments, so that masks and rotary positions are the
    model's whatever its family. Masks of equal layers are one tensor.
    """
    blocks = blocks_of(model, anatomy)
    stream = Stream([], [[] for _ in blocks])
    assert not model.training

    def note(layer: int) -> Any:
        def forward(hidden: Tensor, **arguments: Any) -> Tensor:
            if layer == 0:
                stream.hidden.append(hidden)
            stream.arguments[layer].append(arguments)
            return hidden

        return forward

    for layer, block in enumerate(blocks):
        block.forward = note(layer)
    try:
        for input_ids, mask in batches:
            model.get_decoder()(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return stream


@torch.no_grad()
def block_pass(block: nn.Module, anatomy: Anatomy, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a block: the stream after its attention and the stream after the block, both [documents, tokens, d_model]."""
    with _outputs(linear(block, anatomy.output)) as attention:
        after = block(hidden, **arguments)
    return hidden + attention[0], after


@torch.no_grad()
def attention_inputs(block: nn.Module, anatomy: Anatomy, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Run a block up to the attention's output map: that map's input, [documents, tokens, query heads * head_dim]."""
    return _inputs(block, linear(block, anatomy.output), hidden, arguments)


@torch.no_grad()
def mlp_inputs(block: nn.Module, anatomy: Anatomy, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a block up to the MLP's down map.

    Returns the stream after the attention [documents, tokens, d_model] and the map's input [documents, tokens, channels].
    """
    with _outputs(linear(block, anatomy.output)) as attention:
        inputs = _inputs(block, linear(block, anatomy.down), hidden, arguments)
    return hidden + attention[0], inputs


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What `module` returns inside the context."""
    outputs: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    handle = module.register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()


def _inputs(block: nn.Module, module: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    caught: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        block(hidden, **arguments)
    except _Reached:
        return caught[0]
    finally:
        handle.remove()
    raise AssertionError("the block's forward pass never calls the module")
