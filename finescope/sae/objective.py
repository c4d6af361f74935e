"""The objectives of the four architectures on standardised activations (METHOD 2), and AuxK.

Standardised means variance 1 a coordinate: the mean squared error is then the FVU, up to the batch's own variance.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from finescope.config import SaeSection
from finescope.sae.sparse import Pattern, decode_at, encode_at, rows_of

# Through a dead latent's ReLU a share of the gradient passes, or one that is negative everywhere could never revive.
_DEAD_SLOPE = 0.1
# Of batch_topk: so many times k of each row are looked at before the whole batch is.
_CANDIDATES = 4
# Of jumprelu: width of the window around a threshold in which the threshold feels the gradient, in units of the
# pre-activations of standardised coordinates: from 0 to twice where it starts, as trainings here are short.
_BANDWIDTH = 1.0


@dataclass
class Weights:
    """What is trained, on standardised coordinates: L latents, C coordinates."""

    encoder_weight: Tensor  # [L, C]
    encoder_bias: Tensor  # [L]
    decoder_weight: Tensor  # [L, C], unit rows
    decoder_bias: Tensor  # [C]: the mean, in raw units
    log_threshold: Tensor | None  # [L], jumprelu only

    def named(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


class Losses(NamedTuple):
    """Of one batch [N, C]."""

    total: Tensor  # [], with a graph
    error: Tensor  # [] float64: sum of the squared reconstruction error
    active: Tensor  # [L] bool: active on some activation
    num_active: Tensor  # [] int64: active latents, summed over the activations
    lowest: Tensor | None  # []: the smallest value that was kept (batch_topk)


class _Active(NamedTuple):
    decoded: Tensor  # [N, C], without decoder_bias
    sparsity: Tensor | float  # the term beside the reconstruction
    active: Tensor
    num_active: Tensor
    lowest: Tensor | None


class Scratch:
    """Memory for the largest intermediate result, kept from step to step: fresh pages cost a tenth of a step on a CPU."""

    def __init__(self) -> None:
        self._store = torch.empty(0)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] float32 on the CPU, overwritten by the next call."""
        if self._store.numel() < rows * columns:
            self._store = torch.empty(rows * columns)
        return self._store[: rows * columns].view(rows, columns)


def losses(weights: Weights, batch: Tensor, section: SaeSection, dead: Tensor, scratch: Scratch) -> Losses:
    """The objective on `batch` [N, C]; `dead` int64 are the latents that AuxK takes."""
    centred = batch - weights.decoder_bias.detach()
    if section.architecture in ("topk", "batch_topk"):
        pre = _pre_activations(weights, centred, scratch)
        found = _sparse(weights, centred, pre, section)
    else:
        pre, found = _dense(weights, batch, section)
    residual = batch - found.decoded - weights.decoder_bias
    # By rows first: a long sum is split among the threads, and their number would move the last bits.
    error = residual.square().sum(1).sum()
    total = error / batch.numel() + found.sparsity
    if len(dead) and section.auxk_coefficient:
        count = min(section.auxk or max(1, batch.shape[1] // 2), len(dead))
        auxiliary = _auxiliary(weights, centred, pre.detach(), residual.detach(), count, dead)
        total = total + section.auxk_coefficient * auxiliary
    return Losses(total, error.detach().double(), found.active, found.num_active, found.lowest)


@torch.no_grad()
def _pre_activations(weights: Weights, centred: Tensor, scratch: Scratch) -> Tensor:
    """[N, L] without a graph, to choose latents by: bfloat16 on a GPU, float32 elsewhere."""
    if centred.device.type == "cpu":
        out = scratch.matrix(len(centred), len(weights.encoder_bias))
        return torch.addmm(weights.encoder_bias, centred, weights.encoder_weight.T, out=out)
    with torch.autocast(centred.device.type, torch.bfloat16):
        return functional.linear(centred, weights.encoder_weight, weights.encoder_bias)


def _sparse(weights: Weights, centred: Tensor, pre: Tensor, section: SaeSection) -> _Active:
    num_latents = section.num_latents
    lowest = None
    if section.architecture == "topk":
        chosen, ids = pre.topk(section.k, dim=1, sorted=False)
        pattern, chosen = rows_of(ids, num_latents), chosen.flatten()
    else:
        pattern, chosen = _largest_of_batch(pre, section.k)
        lowest = chosen.min().float() if len(chosen) else None
    known = chosen if chosen.dtype == torch.float32 else None  # in bfloat16 they are computed anew
    values = encode_at(pattern, centred, weights.encoder_weight, weights.encoder_bias, weights.decoder_bias, known).relu()
    on = values.detach() > 0
    # A place more, for the entries that are not active: choosing those that are would make a GPU wait.
    active = torch.zeros(num_latents + 1, dtype=torch.bool, device=pre.device)
    active[torch.where(on, pattern.ids, num_latents)] = True
    return _Active(decode_at(pattern, values, weights.decoder_weight), 0.0, active[:-1], on.sum(), lowest)


@torch.no_grad()
def _largest_of_batch(pre: Tensor, k: int) -> tuple[Pattern, Tensor]:
    """The k * N largest positive entries of [N, L], ties at the end included, and their values.

    They are looked for among the largest of each row; only where a row may have more, in all entries.
    """
    rows, num_latents = pre.shape
    values, ids = pre.topk(min(_CANDIDATES * k, num_latents), dim=1)
    lowest = values.flatten().topk(rows * k).values[-1]
    if values.shape[1] < num_latents and bool((values[:, -1] >= lowest).any()):
        lowest = pre.flatten().topk(rows * k).values[-1]
        values, ids = pre, torch.arange(num_latents, device=pre.device).expand_as(pre)
    kept = (values >= lowest) & (values > 0)
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=pre.device)
    torch.cumsum(kept.sum(1), 0, out=offsets[1:])
    return Pattern(ids[kept], offsets, num_latents), values[kept]


def _dense(weights: Weights, batch: Tensor, section: SaeSection) -> tuple[Tensor, _Active]:
    # (x - b_dec) W^T + b_enc, with the product of weights alone taken out of the large matrix product.
    bias = weights.encoder_bias - weights.encoder_weight @ weights.decoder_bias
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        product = functional.linear(batch, weights.encoder_weight, bias)
    pre = product.float()
    if weights.log_threshold is None:
        values = pre.relu()
        sparsity = section.l1_coefficient * values.sum() / len(batch)
    else:
        threshold = weights.log_threshold.exp()
        values = _jump(pre, threshold)
        sparsity = section.l0_coefficient * _step(pre, threshold).sum() / len(batch)
    on = values > 0
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        decoded = (values @ weights.decoder_weight).float()
    return product, _Active(decoded, sparsity, on.any(0), on.sum(), None)


def _auxiliary(weights: Weights, centred: Tensor, pre: Tensor, residual: Tensor, count: int, dead: Tensor) -> Tensor:
    """AuxK: the `count` dead latents of largest pre-activation reconstruct the residual error [N, C], without b_dec."""
    chosen, ids = pre.index_select(1, dead).topk(count, dim=1, sorted=False)
    pattern = rows_of(ids, len(dead))
    # Gradients of the dead latents' rows alone are made, and added to those of all.
    encoder = functional.embedding(dead, weights.encoder_weight, sparse=True)
    decoder = functional.embedding(dead, weights.decoder_weight, sparse=True)
    known = chosen.flatten() if chosen.dtype == torch.float32 else None
    raw = encode_at(pattern, centred, encoder, weights.encoder_bias[dead], weights.decoder_bias, known)
    guess = decode_at(pattern, _leaky(raw), decoder)
    scale = residual.square().sum(1).sum().clamp(min=1e-12)
    return (residual - guess).square().sum() / scale


def _leaky(pre: Tensor) -> Tensor:
    """ReLU, through which a share of the gradient passes where it is 0."""
    below = pre.clamp(max=0.0)
    return pre.relu() + _DEAD_SLOPE * (below - below.detach())


def _jump(pre: Tensor, threshold: Tensor) -> Tensor:
    """JumpReLU [N, L]: the pre-activation above its threshold [L], else 0."""
    jumped: Any = _Jump.apply(pre, threshold)
    return jumped


def _step(pre: Tensor, threshold: Tensor) -> Tensor:
    """1 where the pre-activation [N, L] is above its threshold [L], else 0."""
    stepped: Any = _Step.apply(pre, threshold)
    return stepped


class _Jump(Function):
    """With the pseudo-derivative of the threshold of arXiv 2407.14435, equation 11 (rectangle kernel)."""

    @staticmethod
    def forward(context: Any, pre: Tensor, threshold: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        context.save_for_backward(pre, threshold)
        return torch.where(pre > threshold, pre, torch.zeros_like(pre)).relu()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, threshold = context.saved_tensors
        through = torch.where((pre > threshold) & (pre > 0), gradient, torch.zeros_like(gradient))
        return through, -(threshold / _BANDWIDTH) * (gradient * _window(pre, threshold)).sum(0)


class _Step(Function):
    """With the pseudo-derivative of arXiv 2407.14435, equation 12."""

    @staticmethod
    def forward(context: Any, pre: Tensor, threshold: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        context.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, threshold = context.saved_tensors
        return None, -(1 / _BANDWIDTH) * (gradient * _window(pre, threshold)).sum(0)


def _window(pre: Tensor, threshold: Tensor) -> Tensor:
    return ((pre - threshold).abs() < _BANDWIDTH / 2).to(pre.dtype)
