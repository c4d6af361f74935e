"""Training of a sparse autoencoder on a stream of activations (METHOD 2), on standardised coordinates."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from finescope.config import SaeSection
from finescope.errors import StepFailed
from finescope.runners.base import Progress
from finescope.sae.autoencoder import SparseAutoencoder, fold
from finescope.sae.fvu import FvuMeter
from finescope.sae.stream import Fill, fill_buffers

_HELD_OUT_SHARE, _HELD_OUT_MAX = 0.05, 16_384
# The encoder starts as a share of the decoder's transpose: at 1 the k latents that win overlap and overshoot.
_ENCODER_START = 0.3
_WARMUP_SHARE, _DECAY_SHARE = 0.05, 0.3
# Through a dead latent's ReLU a share of the gradient passes, or one that is negative everywhere could never revive.
_DEAD_SLOPE = 0.1
_RECORDS = 50  # of the history, over the whole training


@dataclass(frozen=True)
class FitResult:
    """A trained autoencoder and what was measured."""

    autoencoder: SparseAutoencoder
    fvu: float  # of the held-out tail, over the whole of it, in standardised units
    l0: float  # active latents an activation, held out
    dead_share: float  # of the latents, silent for the last `dead_after_tokens` of training
    trained_tokens: int  # different activations
    held_out_tokens: int
    history: list[tuple[int, str, float]] = field(repr=False)  # training step; fvu, l0 or dead_share; value


class _Losses(NamedTuple):
    total: Tensor  # []
    reconstruction: Tensor  # [N, C]
    active: Tensor  # [L] bool: fired on some activation of the batch
    l0: float


def work_units(section: SaeSection) -> int:
    """What `fit` reports as progress in all: each activation when it is read and each time that it is trained on."""
    return section.num_tokens * (1 + section.epochs) + _held_out(section)


def fit(activations: Iterator[Tensor], section: SaeSection, coordinates: Tensor, progress: Progress) -> FitResult:
    """Train on the first `section.num_tokens` activations, measure on those that follow; deterministic by the seed.

    Args:
        activations: chunks [N, d_model], all on the device that is trained on.
        coordinates: [C] int64, sorted.

    Raises:
        StepFailed: the stream has too few activations or no variance, or the loss is not finite.
    """
    sizes: list[int] = []

    def chosen() -> Iterator[Tensor]:
        for chunk in activations:
            sizes.append(chunk.shape[1])
            progress(len(chunk))
            yield chunk.index_select(1, coordinates.to(chunk.device)).float()

    trainer: _Trainer | None = None
    for filled in fill_buffers(
        chosen(), num_tokens=section.num_tokens, held_out=_held_out(section), buffer_tokens=section.buffer_tokens
    ):
        if trainer is None:
            if len(filled.activations) < 2:
                break
            trainer = _Trainer(section, filled.activations)
        trainer.train(filled, progress)
        if filled.last:
            return trainer.finish(filled.held_out, coordinates, sizes[0])
    raise StepFailed("the corpus has too few tokens to train the autoencoder: at least 4 activations are needed")


class _Trainer:
    """Weights on standardised coordinates, the optimiser, and the count of tokens since each latent was active."""

    def __init__(self, section: SaeSection, first: Tensor) -> None:
        """Take the standardisation and the starting directions from the first buffer [n, C]."""
        self.section = section
        self.generator = torch.Generator().manual_seed(section.seed)
        self.mean = first.mean(0)
        deviation = first.std(0, correction=0)
        self.scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        directions = self._directions(first)
        self.decoder_weight = directions.clone().requires_grad_()
        self.encoder_weight = (_ENCODER_START * directions).requires_grad_()
        self.encoder_bias = first.new_zeros(section.num_latents).requires_grad_()
        self.decoder_bias = first.new_zeros(first.shape[1]).requires_grad_()  # the mean, in raw units
        weights = [self.encoder_weight, self.encoder_bias, self.decoder_weight, self.decoder_bias]
        self.optimiser = torch.optim.Adam(weights, lr=section.learning_rate, fused=True)
        self.silent_tokens = torch.zeros(section.num_latents, dtype=torch.int64, device=first.device)
        self.steps = self.trained = 0
        self.history: list[tuple[int, str, float]] = []
        self._window, self._l0 = FvuMeter(), 0.0

    def train(self, filled: Fill, progress: Progress) -> None:
        """`epochs` passes over a buffer, shuffled anew for each."""
        section, data = self.section, filled.activations
        batches = max(1, round(len(data) / section.batch_tokens)) if len(data) else 0
        self.trained += len(data)
        # A stream that ends early is known to do so in its last fill only; the schedule then ends there as well.
        left = 0 if filled.last else max(0, section.num_tokens - self.trained)
        total = self.steps + section.epochs * (batches + math.ceil(left / section.batch_tokens))
        for _ in range(section.epochs):
            order = torch.randperm(len(data), generator=self.generator)
            for rows in order.tensor_split(batches) if batches else ():
                self._step((data[rows.to(data.device)] - self.mean) / self.scale, total)
                progress(len(rows))

    def finish(self, held_out: Tensor, coordinates: Tensor, d_model: int) -> FitResult:
        """Fold the standardisation in and measure on `held_out` [m, C]."""
        section, meter, active = self.section, FvuMeter(), 0.0
        with torch.no_grad():
            for batch in ((held_out - self.mean) / self.scale).split(section.batch_tokens):
                losses = self._losses(batch, auxiliary=False)
                meter.update(batch, losses.reconstruction)
                active += losses.l0 * len(batch)
            weights = fold(self.encoder_weight, self.encoder_bias, self.decoder_weight, self.decoder_bias, self.mean, self.scale)
        weights = {name: weight.detach() for name, weight in weights.items()} | {"coordinates": coordinates.to(held_out.device)}
        autoencoder = SparseAutoencoder(weights, architecture=section.architecture, k=section.k, d_model=d_model)
        dead = self._dead().float().mean().item()
        l0 = active / len(held_out)
        if not math.isfinite(meter.value):
            raise StepFailed("the activations that are held out are all equal: the corpus is too small or all the same")
        return FitResult(autoencoder, meter.value, l0, dead, self.trained, len(held_out), self.history)

    def _directions(self, first: Tensor) -> Tensor:
        """Unit rows [L, C]: standardised activations drawn at random, and random directions where those are too few."""
        count = self.section.num_latents
        drawn = torch.randperm(len(first), generator=self.generator)[:count]
        data = (first[drawn.to(first.device)] - self.mean) / self.scale
        noise = torch.randn(count, first.shape[1], generator=self.generator).to(first)
        noise[: len(data)] = torch.where(data.norm(dim=1, keepdim=True) > 0, data, noise[: len(data)])
        return functional.normalize(noise, dim=1)

    def _step(self, batch: Tensor, total_steps: int) -> None:
        losses = self._losses(batch, auxiliary=True)
        if not torch.isfinite(losses.total):
            raise StepFailed(f"the autoencoder's loss is {losses.total.item()} at step {self.steps}; lower sae.learning_rate")
        losses.total.backward()
        self.silent_tokens += len(batch)
        self.silent_tokens[losses.active] = 0
        with torch.no_grad():
            decoder, gradient = self.decoder_weight, self.decoder_weight.grad
            assert gradient is not None
            # What lies along a row only changes its norm, which is put back below; left in, it spoils Adam's moments.
            gradient -= (gradient * decoder).sum(1, keepdim=True) * decoder
            self._set_learning_rate(total_steps)
            self.optimiser.step()
            self.optimiser.zero_grad()
            decoder.copy_(functional.normalize(decoder, dim=1))
        self.steps += 1
        self._record(batch, losses, max(1, total_steps // _RECORDS))

    def _losses(self, batch: Tensor, *, auxiliary: bool) -> _Losses:
        """The objective on standardised activations [N, C]: variance 1 a coordinate, so that the first term is the FVU."""
        section = self.section
        # (x - b_dec) W^T + b_enc, with the product of weights alone taken out of the large matrix product.
        bias = self.encoder_bias - self.encoder_weight @ self.decoder_bias
        pre = functional.linear(batch, self.encoder_weight, bias)
        fired = torch.zeros(section.num_latents, dtype=torch.bool, device=batch.device)
        if section.architecture == "topk":
            values, ids = pre.topk(section.k, dim=1)
            values = values.relu()
            decoded = functional.embedding_bag(ids, self.decoder_weight, per_sample_weights=values, mode="sum")
            fired[ids[values > 0]] = True
            sparsity = 0.0
        else:
            values = pre.relu()
            decoded = values @ self.decoder_weight
            fired |= (values > 0).any(0)
            sparsity = section.l1_coefficient * values.sum() / len(batch)
        reconstruction = decoded + self.decoder_bias
        residual = batch - reconstruction
        loss = residual.square().sum() / batch.numel() + sparsity
        if auxiliary and section.auxk_coefficient:
            loss = loss + section.auxk_coefficient * self._auxiliary(pre, residual.detach())
        return _Losses(loss, reconstruction, fired, (values > 0).sum().item() / len(batch))

    def _auxiliary(self, pre: Tensor, residual: Tensor) -> Tensor | float:
        """AuxK: the dead latents of largest pre-activation reconstruct the residual error, without b_dec."""
        dead = self._dead().nonzero()[:, 0]
        if not len(dead):
            return 0.0
        largest, place = pre[:, dead].topk(min(self.section.auxk, len(dead)), dim=1)
        below = largest.clamp(max=0.0)
        values = largest.relu() + _DEAD_SLOPE * (below - below.detach())
        guess = functional.embedding_bag(dead[place], self.decoder_weight, per_sample_weights=values, mode="sum")
        # By rows first: a long sum is split among the threads, and their number would move the gradient's last bits.
        scale = residual.square().sum(1).sum().clamp(min=1e-12)
        return (residual - guess).square().sum() / scale

    def _dead(self) -> Tensor:
        return self.silent_tokens >= self.section.dead_after_tokens

    def _set_learning_rate(self, total_steps: int) -> None:
        """Linear warm-up, a plateau, linear decay to zero."""
        warmup = min(1.0, (self.steps + 1) / max(1.0, _WARMUP_SHARE * total_steps))
        decay = min(1.0, (total_steps - self.steps) / max(1.0, _DECAY_SHARE * total_steps))
        for group in self.optimiser.param_groups:
            group["lr"] = self.section.learning_rate * min(warmup, decay)

    def _record(self, batch: Tensor, losses: _Losses, every: int) -> None:
        self._window.update(batch, losses.reconstruction)
        self._l0 += losses.l0 * len(batch)
        if self.steps % every:
            return
        values = {
            "fvu": self._window.value,
            "l0": self._l0 / self._window.count,
            "dead_share": self._dead().float().mean().item(),
        }
        self.history += [(self.steps, name, value) for name, value in values.items()]
        self._window, self._l0 = FvuMeter(), 0.0


def _held_out(section: SaeSection) -> int:
    return max(2, min(_HELD_OUT_MAX, int(section.num_tokens * _HELD_OUT_SHARE)))
