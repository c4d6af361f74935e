"""Importance of each group: first-order Taylor (LLM-Pruner, arXiv 2305.11627), magnitude, random."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from finescope.errors import StepFailed
from finescope.models.anatomy import Anatomy, blocks_of, linear
from finescope.pruning.groups import Groups, GroupSlice, group_slices, group_sums, groups_of

Batch = tuple[Tensor, Tensor]  # input_ids, attention_mask: int64 [documents, tokens], padded on the right
Progress = Callable[[int], None]  # takes the tokens (padding not counted) done since the last call

_LOGIT_ROWS = 512  # tokens whose logits are in memory at a time: [512, vocabulary] float32


class Importance(NamedTuple):
    """One number a group, the same unit for both kinds; larger is more important."""

    heads: list[np.ndarray]  # a layer: float32 [num_kv_heads]
    mlp: list[np.ndarray]  # a layer: float32 [num_channels]


def taylor_importance(model: PreTrainedModel, anatomy: Anatomy, batches: Iterable[Batch], progress: Progress) -> Importance:
    """Element-wise first-order Taylor importance, in nats a token: sum over the group's parameters of |w * dL/dw|.

    LLM-Pruner (arXiv 2305.11627, section 3.2, element-wise, first order) takes the gradient of the whole calibration set.
    Here the absolute value is taken batch by batch and summed, weighted by the tokens of the batch: sum over batches of
    sum |w * g_batch|. So no gradient outlives its batch and, within the batch, each weight's gradient is reduced to its groups'
    sums and freed as soon as it is complete. Smaller batches cancel less: how documents are batched belongs to the result.
    Embeddings, head and norms get no gradient.

    Raises:
        StepFailed: no document has two tokens, or the importance is not finite.
    """
    groups = groups_of(model, anatomy)
    device = model.device
    sums = {
        kind: torch.zeros(groups.num_layers, count, dtype=torch.float64, device=device)
        for kind, count in (("heads", groups.num_kv_heads), ("mlp", groups.num_channels))
    }
    total = 0
    weight = [0]  # tokens that the batch in flight predicts; read by the hooks

    def reduce(parameter: nn.Parameter, part: GroupSlice, layer: int) -> None:
        assert parameter.grad is not None
        product = parameter.grad.float().mul_(parameter.detach()).abs_()
        sums[part.kind][layer] += weight[0] * group_sums(product, part)
        parameter.grad = None

    with _gradients_of_groups(model, anatomy, groups, reduce):
        for input_ids, mask in batches:
            weight[0] = int(mask[:, 1:].sum())
            if weight[0]:
                _backward(model, input_ids.to(device), mask.to(device))
            total += weight[0]
            progress(int(mask.sum()))
    if not total:
        raise StepFailed("importance: no calibration document has two tokens")
    importance = Importance(*([row.float().cpu().numpy() for row in sums[kind] / total] for kind in ("heads", "mlp")))
    for kind, layers in importance._asdict().items():
        for layer, values in enumerate(layers):
            if not np.isfinite(values).all():
                raise StepFailed(
                    f"importance: {kind} of {anatomy.blocks}.{layer} is not finite (dtype {model.dtype}); use float32 or bfloat16"
                )
    return importance


def magnitude_importance(model: PreTrainedModel, anatomy: Anatomy) -> Importance:
    """Sum of squared parameters of each group (LLM-Pruner's L2 magnitude)."""
    groups = groups_of(model, anatomy)
    layers = {"heads": [], "mlp": []}
    for block in blocks_of(model, anatomy):
        sums = {"heads": torch.zeros(groups.num_kv_heads), "mlp": torch.zeros(groups.num_channels)}
        for part in group_slices(anatomy, groups):
            for parameter in _group_parameters(linear(block, part.name), part):
                sums[part.kind] += group_sums(parameter.detach().float().square(), part).cpu()
        for kind, values in sums.items():
            layers[kind].append(values.numpy())
    return Importance(**layers)


def random_importance(groups: Groups, seed: int) -> Importance:
    """Uniform in [0, 1) a parameter: scaled by the group's parameters, so that neither kind is the cheaper one by its size."""
    rng = np.random.default_rng(seed)
    heads = rng.random((groups.num_layers, groups.num_kv_heads)) * groups.head_params
    mlp = rng.random((groups.num_layers, groups.num_channels)) * groups.channel_params
    return Importance(list(heads.astype(np.float32)), list(mlp.astype(np.float32)))


def _group_parameters(module: nn.Linear, part: GroupSlice) -> Sequence[nn.Parameter]:
    """The bias of an output map belongs to no group: it is added once, whatever is removed."""
    return [parameter for name, parameter in module.named_parameters() if name == "weight" or part.axis == 0]


@contextmanager
def _gradients_of_groups(
    model: PreTrainedModel, anatomy: Anatomy, groups: Groups, reduce: Callable[[nn.Parameter, GroupSlice, int], None]
) -> Iterator[None]:
    """Inside, only parameters of groups have gradients and `reduce` takes each as soon as it is complete."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training, handles = model.training, []
    model.requires_grad_(False).eval()
    for layer, block in enumerate(blocks_of(model, anatomy)):
        for part in group_slices(anatomy, groups):
            for parameter in _group_parameters(linear(block, part.name), part):
                parameter.requires_grad_(True)
                hook = lambda leaf, part=part, layer=layer: reduce(leaf, part, layer)  # noqa: E731
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
        model.train(training)


def _backward(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> None:
    """Backpropagate the mean next-token loss over the tokens that are not padding: both arguments [documents, tokens].

    The head runs on a few rows at a time, forward and backward, so that the logits of a batch are never all in memory.
    """
    hidden = model.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    predicts = mask[:, 1:].bool()
    states = hidden[:, :-1][predicts]  # [predictions, d_model]
    targets = input_ids[:, 1:][predicts]
    head, gradient = model.get_output_embeddings(), torch.empty_like(states)
    assert head is not None
    for start in range(0, len(targets), _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        leaf = states[rows].detach().requires_grad_(True)
        loss = functional.cross_entropy(head(leaf).float(), targets[rows], reduction="sum") / len(targets)
        (gradient[rows],) = torch.autograd.grad(loss, leaf)
    states.backward(gradient)
