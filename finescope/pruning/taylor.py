"""Taylor importance of first and second order (LLM-Pruner, arXiv 2305.11627), with one block in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy, has_experts
from finescope.models.blocks import Blocks
from finescope.models.groups import Layout
from finescope.models.likelihood import logits_of
from finescope.pruning.groups import Place, add_sums, stretches
from finescope.pruning.hidden import HiddenStates
from finescope.pruning.importance import Importance, group_sums, importance_of, scored
from finescope.pruning.stream import Batch, Call, Portions, Progress, open_stream

Order = Literal[1, 2]

LOGIT_ROWS = 512  # tokens whose logits are in memory at a time: [512, vocabulary] float32


def taylor_importance(
    source: Blocks, layout: Layout, order: Order, batches: Sequence[Batch], boundaries: HiddenStates, progress: Progress
) -> Importance:
    """Element-wise Taylor importance, in nats a token, summed over the group's parameters.

    First order: |w * dL/dw|. Second: w^2 F / 2, F the diagonal of the Fisher information of a token, which a batch of n tokens
    whose mean gradient is g estimates as n g^2 (LLM-Pruner's equation 5 without its first term).

    LLM-Pruner (arXiv 2305.11627, section 3.2, element-wise) takes the gradient of the whole calibration set.
    Here the absolute value is taken batch by batch and summed, weighted by the tokens of the batch: sum over batches of
    sum |w * g_batch|. So no gradient outlives its batch and, within the batch, each weight's gradient is reduced to its groups'
    sums and freed as soon as it is complete. Smaller batches cancel less: how documents are batched belongs to the result.
    Embeddings, head, routers and norms over the stream get no gradient. An expert to which no token is sent has importance 0.

    Every batch goes through a block before any goes through the next; what a block was given is put by in `boundaries`. Then,
    from the last block to the first, each is run again on it, with a graph of that block alone, through which the gradient is
    passed on. `progress` sums to the tokens once.

    Raises:
        StepFailed: no document has two tokens, or the importance is not finite.
    """
    num_tokens = sum(int(mask.sum()) for _, mask in batches)
    batches = [(ids, mask) for ids, mask in batches if _predicted(mask)]
    if not batches:
        raise StepFailed("importance: no calibration document has two tokens")
    model, anatomy = source.model, source.anatomy
    # A pass forward, again forward and backward: in passes forward about 1 + 3.
    portions = Portions(num_tokens, 4 * layout.num_layers, progress)
    stream = open_stream(model, anatomy, batches)
    for layer in range(layout.num_layers):
        with source.block(layer) as block, torch.no_grad():
            for index, hidden, call in stream.at(layer):
                boundaries.put(layer, index, stream.hidden[index])
                stream.hidden[index] = block(hidden, *call.positional, **call.named).cpu()
        portions.done(1)
    for index, (ids, mask) in enumerate(batches):
        stream.hidden[index] = _loss_gradient(model, anatomy, stream.hidden[index], ids, mask).cpu()
    sums = _Sums(layout, order, model.device)
    for layer in reversed(range(layout.num_layers)):
        with source.block(layer) as block, _gradients_of_groups(block, anatomy, layout, layer, sums):
            for index, gradient, call in stream.at(layer):
                sums.begin(batches[index][1].to(model.device))
                hidden = boundaries.take(layer, index).to(model.device)
                stream.hidden[index] = _back_through(block, hidden, call, gradient).cpu()
        portions.done(3)
    predicted = sum(_predicted(mask) for _, mask in batches)
    return importance_of([totals / predicted for totals in sums.totals], layout, source, sums.expert_tokens)


class _Sums:
    """What a pass adds up, for each of `Layout.groups`: float64 [its layers, rows, number]."""

    def __init__(self, layout: Layout, order: Order, device: torch.device) -> None:
        self.totals, self._order = group_sums(layout, device), order
        self.expert_tokens: dict[int, Tensor] = {}

    def begin(self, mask: Tensor) -> None:
        """Another batch of the block: its mask int64 [documents, tokens]."""
        self.mask, self.weight = mask, _predicted(mask)
        self._experts: list[int] = []  # those that got a token of it

    def route(self, layer: int, chosen: Tensor, experts: int) -> None:
        """Take in which experts a router chose: int64 [documents * tokens, experts a token]."""
        tokens = torch.bincount(chosen[self.mask.reshape(-1).bool()].reshape(-1), minlength=experts)
        self._experts = tokens.nonzero()[:, 0].tolist()
        self.expert_tokens[layer] = self.expert_tokens.get(layer, torch.zeros_like(tokens)) + tokens

    @torch.no_grad()
    def reduce(self, parameter: nn.Parameter, places: list[Place]) -> None:
        """Take in what one parameter's gradient says of it, and free the gradient."""
        assert parameter.grad is not None
        # What a kernel leaves as the gradient of an expert without tokens is not read.
        for stretch in stretches(places, self._experts):
            product = parameter.grad[stretch].float().mul_(parameter[stretch])
            product = product.abs_() if self._order == 1 else product.square_().mul_(self.weight / 2)
            for place in places:
                add_sums(self.totals[place.which][place.position], product, place, stretch, self.weight)
        parameter.grad = None


@contextmanager
def _gradients_of_groups(block: nn.Module, anatomy: Anatomy, layout: Layout, layer: int, sums: _Sums) -> Iterator[None]:
    """Inside, only parameters of groups have gradients and `sums` takes each as soon as it is complete."""
    before = {parameter: parameter.requires_grad for parameter in block.parameters()}
    handles = []
    block.requires_grad_(False)
    for name, places in scored(layout, layer).items():
        parameter = block.get_parameter(name).requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(lambda leaf, places=places: sums.reduce(leaf, places)))
    if has_experts(block, anatomy):
        assert anatomy.experts is not None
        see = _router_hook(sums, layer, layout.parts[layer]["expert"][0])
        handles.append(block.get_submodule(anatomy.experts).register_forward_pre_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _router_hook(sums: _Sums, layer: int, experts: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        _, chosen, _ = arguments  # hidden states, experts chosen, their weights
        sums.route(layer, chosen, experts)

    return see


@torch.enable_grad()
def _back_through(block: nn.Module, hidden: Tensor, call: Call, gradient: Tensor) -> Tensor:
    """Run a block and backpropagate: the gradient at its input, of that at its output, all [documents, tokens, d_model]."""
    leaf = hidden.detach().requires_grad_(True)
    block(leaf, *call.positional, **call.named).backward(gradient)
    assert leaf.grad is not None
    return leaf.grad


@torch.enable_grad()
def _loss_gradient(model: PreTrainedModel, anatomy: Anatomy, hidden: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """The gradient of the mean next-token loss over the tokens that are not padding, at the last block's output.

    hidden: [documents, tokens, d_model], as is what is returned. The head runs on a few rows at a time, forward and backward, so
    that the logits of a batch are never all in memory.
    """
    leaf = hidden.to(model.device).detach().requires_grad_(True)
    predicts = mask[:, 1:].bool().to(model.device)
    states = model.get_submodule(anatomy.final_norm)(leaf)[:, :-1][predicts]  # [predictions, d_model]
    targets = input_ids.to(model.device)[:, 1:][predicts]
    gradient = torch.empty_like(states)
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        part = states[rows].detach().requires_grad_(True)
        loss = functional.cross_entropy(logits_of(model, part).float(), targets[rows], reduction="sum") / len(targets)
        (gradient[rows],) = torch.autograd.grad(loss, part)
    (found,) = torch.autograd.grad(states, leaf, gradient)
    return found


def _predicted(mask: Tensor) -> int:
    """The tokens that a batch predicts."""
    return int(mask[:, 1:].sum())
