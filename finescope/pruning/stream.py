"""The residual stream block by block: the calibration set's hidden states, one block's at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finescope.models.anatomy import Anatomy, blocks_of, has_experts

Batch = tuple[Tensor, Tensor]  # input_ids, attention_mask: int64 [documents, tokens], padded on the right
Progress = Callable[[int], None]  # takes the tokens (padding not counted) done since the last call


class Call(NamedTuple):
    """What a block is called with beside the hidden states: masks, positions."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class Stream(NamedTuple):
    """The hidden states before some block, and what each block must be called with."""

    hidden: list[Tensor]  # a batch: [documents, tokens, d_model], on the CPU; the caller replaces it block by block
    calls: list[list[Call]]  # a layer, a batch
    device: torch.device  # where the blocks run

    def at(self, layer: int) -> Iterator[tuple[int, Tensor, Call]]:
        """By batch: its number, its hidden states on the device, and what block `layer` is called with beside them."""
        for index, call in enumerate(self.calls[layer]):
            yield index, self.hidden[index].to(self.device), call


class Portions:
    """Tells `progress` of work in equal parts, so that it sums to `num_tokens`."""

    def __init__(self, num_tokens: int, parts: int, progress: Progress) -> None:
        self._tokens, self._parts, self._progress, self._done = num_tokens, parts, progress, 0

    def done(self, parts: int) -> None:
        """So many parts more are done."""
        before, self._done = self._done, self._done + parts
        if told := self._tokens * self._done // self._parts - self._tokens * before // self._parts:
            self._progress(told)


class _Reached(Exception):
    """Leaves a block's forward pass where the module of interest is called."""


@torch.no_grad()
def open_stream(model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Batch]) -> Stream:
    """The stream before the first block, and every block's arguments, as the model itself makes them.

    The model's own forward pass runs with blocks that only note their arguments, so that masks and rotary positions are the
    model's whatever its family. So the blocks' weights may be on the meta device. Masks of equal layers are one tensor.
    """
    blocks = blocks_of(model, anatomy)
    stream = Stream([], [[] for _ in blocks], model.device)
    assert not model.training

    def note(layer: int) -> Any:
        def forward(hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
            if layer == 0:
                stream.hidden.append(hidden.cpu())
            stream.calls[layer].append(Call(positional, named))
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
def advance(block: nn.Module, stream: Stream, layer: int) -> None:
    """Move a stream past a block."""
    for index, hidden, call in stream.at(layer):
        stream.hidden[index] = block(hidden, *call.positional, **call.named).cpu()


class Passage(NamedTuple):
    """What a batch is on its way through a block, all [documents, tokens, d_model]."""

    attention_reads: Tensor  # the input of query, key and value
    between: Tensor  # the stream after the attention; beside an MLP in parallel: the stream with the attention's output alone
    mlp_reads: Tensor  # the input of the MLP
    after: Tensor  # the stream after the block


@torch.no_grad()
def passage(block: nn.Module, anatomy: Anatomy, hidden: Tensor, call: Call) -> Passage:
    """Run a block and note what happens on the way."""
    reads: list[Tensor] = []
    note = lambda _, arguments: reads.append(arguments[0])  # noqa: E731
    handles = [block.get_submodule(name).register_forward_pre_hook(note) for name in (anatomy.qkv[0], anatomy.mlp)]
    try:
        with _attention(block, anatomy) as attention:
            after = block(hidden, *call.positional, **call.named)
    finally:
        for handle in handles:
            handle.remove()
    return Passage(reads[0], hidden + attention[0], reads[1], after)


@torch.no_grad()
def input_of(module: str, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Run a block up to one of its modules: what that is given, [documents, tokens, in]."""
    return _arguments(block, module, hidden, call)[0]


@torch.no_grad()
def output_inputs(block: nn.Module, anatomy: Anatomy, hidden: Tensor, call: Call) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Run a block: the input of the attention's output map, what the down map or the experts are called with, the stream after.

    The first is [documents, tokens, query heads * head_dim], the second as in `mlp_arguments`.
    """
    caught: dict[str, tuple[Tensor, ...]] = {}
    reached = _writer(block, anatomy)
    note = lambda name: lambda _, arguments: caught.__setitem__(name, arguments)  # noqa: E731
    handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in (anatomy.output, reached)]
    try:
        after = block(hidden, *call.positional, **call.named)
    finally:
        for handle in handles:
            handle.remove()
    return caught[anatomy.output][0], caught[reached], after


def fitted_tokens(batches: Sequence[Batch]) -> list[Tensor]:
    """The tokens that say what a block does: neither padding nor position 0; bool [documents, tokens] a batch."""
    chosen = []
    for _, mask in batches:
        assert bool((mask[:, :1] == 1).all()), "documents are padded on the right and hold a token"
        chosen.append(mask.bool().clone())
        chosen[-1][:, 0] = False
    return chosen


@torch.no_grad()
def mlp_arguments(block: nn.Module, anatomy: Anatomy, hidden: Tensor, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a block up to the MLP's down map, or up to its experts.

    Returns the stream after the attention [documents, tokens, d_model], and what is reached is called with: the down map with
    [documents, tokens, channels]; the experts with hidden states [documents * tokens, d_model], for each the experts chosen,
    int64 [documents * tokens, experts a token], and their weights, of the same shape.
    """
    with _attention(block, anatomy) as attention:
        arguments = _arguments(block, _writer(block, anatomy), hidden, call)
    return hidden + attention[0], arguments


def _writer(block: nn.Module, anatomy: Anatomy) -> str:
    """The module of a block's MLP that writes into the stream."""
    reached = anatomy.experts if has_experts(block, anatomy) else anatomy.down
    assert reached is not None
    return reached


@contextmanager
def _attention(block: nn.Module, anatomy: Anatomy) -> Iterator[list[Tensor]]:
    """What the attention adds to the stream inside the context."""
    outputs: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    handle = block.get_submodule(anatomy.attention_norm or anatomy.output).register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()


def _arguments(block: nn.Module, name: str, hidden: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Run a block up to the module `name`: its positional arguments."""
    caught: list[tuple[Tensor, ...]] = []

    def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments)
        raise _Reached

    handle = block.get_submodule(name).register_forward_pre_hook(stop)
    try:
        block(hidden, *call.positional, **call.named)
    except _Reached:
        return caught[0]
    finally:
        handle.remove()
    raise AssertionError("the block's forward pass never calls the module")
