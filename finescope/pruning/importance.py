"""Importance of each group: first-order Taylor (LLM-Pruner, arXiv 2305.11627), magnitude, random."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy, blocks_of, has_experts
from finescope.models.groups import Layout
from finescope.models.likelihood import logits_of
from finescope.pruning.groups import Place, add_sums, places_of, stretches

Batch = tuple[Tensor, Tensor]  # input_ids, attention_mask: int64 [documents, tokens], padded on the right
Progress = Callable[[int], None]  # takes the tokens (padding not counted) done since the last call

_LOGIT_ROWS = 512  # tokens whose logits are in memory at a time: [512, vocabulary] float32


class Importance(NamedTuple):
    """One number a group, the same unit for all kinds; larger is more important."""

    values: tuple[np.ndarray, ...]  # for each of `Layout.groups`: float32 [its layers, rows, number]
    expert_tokens: dict[int, np.ndarray]  # where tokens were run, by layer with experts: tokens that each got, int64 [experts]


def taylor_importance(
    model: PreTrainedModel, anatomy: Anatomy, layout: Layout, batches: Iterable[Batch], progress: Progress
) -> Importance:
    """Element-wise first-order Taylor importance, in nats a token: sum over the group's parameters of |w * dL/dw|.

    LLM-Pruner (arXiv 2305.11627, section 3.2, element-wise, first order) takes the gradient of the whole calibration set.
    Here the absolute value is taken batch by batch and summed, weighted by the tokens of the batch: sum over batches of
    sum |w * g_batch|. So no gradient outlives its batch and, within the batch, each weight's gradient is reduced to its groups'
    sums and freed as soon as it is complete. Smaller batches cancel less: how documents are batched belongs to the result.
    Embeddings, head, routers and norms over the stream get no gradient. An expert to which no token is sent has importance 0.

    Raises:
        StepFailed: no document has two tokens, or the importance is not finite.
    """
    device, total = model.device, 0
    sums = _Sums(layout, device)
    with _gradients_of_groups(model, anatomy, layout, sums):
        for input_ids, mask in batches:
            sums.begin(mask.to(device))
            if sums.weight:
                _backward(model, input_ids.to(device), sums.mask)
            total += sums.weight
            progress(int(mask.sum()))
    if not total:
        raise StepFailed("importance: no calibration document has two tokens")
    values = tuple((totals / total).float().cpu().numpy() for totals in sums.totals)
    for groups, found in zip(layout.groups, values, strict=True):
        for layer, block in zip(groups.layers, found, strict=True):
            if not np.isfinite(block).all():
                place = f"{anatomy.blocks}.{layer}"
                raise StepFailed(
                    f"importance: {groups.kind} of {place} is not finite (dtype {model.dtype}); use float32 or bfloat16"
                )
    return Importance(values, {layer: tokens.cpu().numpy() for layer, tokens in sorted(sums.expert_tokens.items())})


@torch.no_grad()
def magnitude_importance(model: PreTrainedModel, anatomy: Anatomy, layout: Layout) -> Importance:
    """Sum of squared parameters of each group (LLM-Pruner's L2 magnitude)."""
    sums = _Sums(layout, model.device)
    for layer, block in enumerate(blocks_of(model, anatomy)):
        for name, places in _scored(layout, layer).items():
            parameter = block.get_parameter(name)
            for stretch in stretches(places, range(len(parameter))):
                squares = parameter[stretch].float().square()
                for place in places:
                    add_sums(sums.totals[place.which][place.position], squares, place, stretch)
    return Importance(tuple(totals.float().cpu().numpy() for totals in sums.totals), {})


def random_importance(layout: Layout, seed: int) -> Importance:
    """Uniform in [0, 1) a parameter: scaled by the group's parameters, so that no kind is the cheaper one by its size."""
    rng = np.random.default_rng(seed)
    shapes = [(len(groups.layers), groups.rows, groups.number) for groups in layout.groups]
    drawn = [rng.random(shape) * groups.params for shape, groups in zip(shapes, layout.groups, strict=True)]
    return Importance(tuple(values.astype(np.float32) for values in drawn), {})


class _Sums:
    """What a pass adds up, for each of `Layout.groups`: float64 [its layers, rows, number]."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        shapes = [(len(groups.layers), groups.rows, groups.number) for groups in layout.groups]
        self.totals = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
        self.expert_tokens: dict[int, Tensor] = {}
        self.begin(torch.empty(0, 0, dtype=torch.int64))

    def begin(self, mask: Tensor) -> None:
        """Another batch: its mask int64 [documents, tokens]."""
        self.mask, self.weight = mask, int(mask[:, 1:].sum())  # the tokens that it predicts
        self._experts: dict[int, list[int]] = {}  # by layer, those that got a token of it

    def route(self, layer: int, chosen: Tensor, experts: int) -> None:
        """Take in which experts a router chose: int64 [documents * tokens, experts a token]."""
        tokens = torch.bincount(chosen[self.mask.reshape(-1).bool()].reshape(-1), minlength=experts)
        self._experts[layer] = tokens.nonzero()[:, 0].tolist()
        self.expert_tokens[layer] = self.expert_tokens.get(layer, torch.zeros_like(tokens)) + tokens

    @torch.no_grad()
    def reduce(self, parameter: nn.Parameter, places: list[Place], layer: int) -> None:
        """Take in |w * dL/dw| of one parameter and free its gradient."""
        assert parameter.grad is not None
        # What a kernel leaves as the gradient of an expert without tokens is not read.
        for stretch in stretches(places, self._experts.get(layer, ())):
            product = parameter.grad[stretch].float().mul_(parameter[stretch]).abs_()
            for place in places:
                add_sums(self.totals[place.which][place.position], product, place, stretch, self.weight)
        parameter.grad = None


def _scored(layout: Layout, layer: int) -> dict[str, list[Place]]:
    """The parameters of a block that say how important its groups are, and their groups."""
    scored: dict[str, list[Place]] = {}
    for place in places_of(layout, layer):
        if place.cut.scored:
            scored.setdefault(place.cut.parameter, []).append(place)
    return scored


@contextmanager
def _gradients_of_groups(model: PreTrainedModel, anatomy: Anatomy, layout: Layout, sums: _Sums) -> Iterator[None]:
    """Inside, only parameters of groups have gradients and `sums` takes each as soon as it is complete."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training, handles = model.training, []
    model.requires_grad_(False).eval()
    for layer, block in enumerate(blocks_of(model, anatomy)):
        for name, places in _scored(layout, layer).items():
            parameter = block.get_parameter(name).requires_grad_(True)
            hook = lambda leaf, places=places, layer=layer: sums.reduce(leaf, places, layer)  # noqa: E731
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
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
        model.train(training)


def _router_hook(sums: _Sums, layer: int, experts: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def see(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        _, chosen, _ = arguments  # hidden states, experts chosen, their weights
        sums.route(layer, chosen, experts)

    return see


def _backward(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> None:
    """Backpropagate the mean next-token loss over the tokens that are not padding: both arguments [documents, tokens].

    The head runs on a few rows at a time, forward and backward, so that the logits of a batch are never all in memory.
    """
    hidden = model.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    predicts = mask[:, 1:].bool()
    states = hidden[:, :-1][predicts]  # [predictions, d_model]
    targets = input_ids[:, 1:][predicts]
    gradient = torch.empty_like(states)
    for start in range(0, len(targets), _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        leaf = states[rows].detach().requires_grad_(True)
        loss = functional.cross_entropy(logits_of(model, leaf).float(), targets[rows], reduction="sum") / len(targets)
        (gradient[rows],) = torch.autograd.grad(loss, leaf)
    states.backward(gradient)
