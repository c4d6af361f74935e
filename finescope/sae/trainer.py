"""One dictionary in training: its weights, its optimiser, and the count of tokens since each latent was active."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finescope.config import SaeSection
from finescope.errors import StepFailed
from finescope.sae.autoencoder import fold
from finescope.sae.group import Group
from finescope.sae.objective import Losses, Scratch, Weights, losses

# The encoder starts as a share of the decoder's transpose: at 1 the k latents that win overlap and overshoot.
_ENCODER_START = 0.3
# Parts of a random direction to one of an activation: with fewer, some latents stay dead (docs/benchmarks.md).
_RANDOM_PARTS = 4.0
# Of jumprelu, in units of the pre-activations of standardised coordinates.
_THRESHOLD_START = 0.5
# Adam moves a threshold's logarithm by its rate a step at most: at the weights' rate it would take tens of thousands.
_THRESHOLD_RATE = 10.0
# Of batch_topk: how much of the threshold that inference uses stays at a step.
_THRESHOLD_MEMORY = 0.99
_RECORDS = 50  # of the history, over the whole training
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainer:
    """Everything about one dictionary that a step changes. Activations come standardised."""

    def __init__(self, section: SaeSection, directions: Tensor) -> None:
        """Start from `directions` [num_latents, C], unit rows."""
        self.section = section
        size, width = directions.shape
        threshold = directions.new_full((size,), _THRESHOLD_START).log() if section.architecture == "jumprelu" else None
        self.weights = Weights(
            encoder_weight=(_ENCODER_START * directions).requires_grad_(),
            encoder_bias=directions.new_zeros(size).requires_grad_(),
            decoder_weight=directions.clone().requires_grad_(),
            decoder_bias=directions.new_zeros(width).requires_grad_(),
            log_threshold=None if threshold is None else threshold.requires_grad_(),
        )
        groups = [
            {"params": [weight], "rate": _THRESHOLD_RATE if name == "log_threshold" else 1.0}
            for name, weight in self.weights.named().items()
        ]
        self._optimiser = torch.optim.Adam(groups, lr=section.learning_rate, fused=True)
        self.silent_tokens = torch.zeros(size, dtype=torch.int64, device=directions.device)
        self.batch_threshold = directions.new_zeros(())  # batch_topk: running mean of the smallest value kept
        self.steps = 0
        self.history: list[tuple[int, str, float]] = []
        # Since the last record: sums of x [C], of |x|^2, of the squared error, of active latents; activations.
        self._window = torch.zeros(width + 4, dtype=torch.float64, device=directions.device)
        self._active = torch.zeros(size, dtype=torch.bool, device=directions.device)
        self._lowest = directions.new_zeros(2)  # batch_topk, since the last step: sum of the smallest values kept; shares
        self._rows = 0
        self._scratch = Scratch()

    def accumulate(self, batch: Tensor, shares: int) -> None:
        """Add the gradients of one of the `shares` of a step: standardised activations [N, C]."""
        found = losses(self.weights, batch, self.section, self.dead().nonzero()[:, 0], self._scratch)
        (found.total / shares).backward()
        self._active |= found.active
        self._rows += len(batch)
        self._tally(batch, found)
        if found.lowest is not None:
            self._lowest += torch.stack([found.lowest, torch.ones_like(found.lowest)])

    def step(self, group: Group, total_steps: int) -> None:
        """Sum the gradients over the group, move the weights, put the decoder's rows back to unit norm."""
        weights = self.weights
        group.add([weight.grad for weight in weights.named().values() if weight.grad is not None])
        self.silent_tokens += self._rows * group.size
        self.silent_tokens[group.either(self._active)] = 0
        with torch.no_grad():
            decoder, gradient = weights.decoder_weight, weights.decoder_weight.grad
            assert gradient is not None
            # What lies along a row only changes its norm, which is put back below; left in, it spoils Adam's moments.
            gradient.addcmul_(decoder, torch.einsum("lc,lc->l", gradient, decoder)[:, None], value=-1)
            self._set_learning_rate(total_steps)
            self._optimiser.step()
            self._optimiser.zero_grad()
            decoder.div_(torch.linalg.vector_norm(decoder, dim=1, keepdim=True).clamp(min=1e-12))
        if self.section.architecture == "batch_topk":
            self._move_threshold(group)
        self._active.zero_()
        self._rows = 0
        self.steps += 1
        if self.steps % max(1, total_steps // _RECORDS) == 0:
            self.record(group)

    def record(self, group: Group) -> None:
        """Put the figures since the last record into the history.

        Raises:
            StepFailed: the loss is not finite.
        """
        group.add([self._window])
        *means, squares, error, active, count = self._window.tolist()
        self._window.zero_()
        if not count:
            return
        if not error < float("inf"):
            raise StepFailed(f"the autoencoder's loss is {error} at step {self.steps}; lower sae.learning_rate")
        variance = squares - sum(mean * mean for mean in means) / count
        values = {
            "fvu": error / variance if variance > 0 else float("nan"),
            "l0": active / count,
            "dead_share": self.dead().float().mean().item(),
        }
        self.history += [(self.steps, name, value) for name, value in values.items()]

    def dead(self) -> Tensor:
        """[L] bool: which latents have been silent for `dead_after_tokens` activations."""
        return self.silent_tokens >= self.section.dead_after_tokens

    def folded(self, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """The weights for raw activations, with their thresholds; `mean`, `scale` [C] are the standardisation's."""
        weights = self.weights
        raw = fold(weights.encoder_weight, weights.encoder_bias, weights.decoder_weight, weights.decoder_bias, mean, scale)
        threshold = torch.zeros_like(weights.encoder_bias)
        if weights.log_threshold is not None:
            threshold = weights.log_threshold.exp()
        elif self.section.architecture == "batch_topk":
            threshold = threshold + self.batch_threshold
        return {name: tensor.detach() for name, tensor in {**raw, "threshold": threshold}.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a training goes on from, right after `record`: tensors, and what JSON takes."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.named().items():
            tensors[name] = weight.detach()
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = self._optimiser.state[weight][moment]
        tensors |= {"silent_tokens": self.silent_tokens, "batch_threshold": self.batch_threshold}
        return tensors, {"steps": self.steps, "history": self.history}

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Take what `state` gave."""
        with torch.no_grad():
            for name, weight in self.weights.named().items():
                weight.copy_(tensors[name])
                # Copies: what is read lies in a file, which the next checkpoints delete.
                moments = {moment: tensors[f"{moment}.{name}"].to(weight.device, copy=True) for moment in _MOMENTS}
                # Where torch keeps the count depends on the optimiser's kernel: fused ones want it beside the weight.
                self._optimiser.state[weight] = {
                    "step": torch.tensor(float(record["steps"]), device=weight.device),
                    **moments,
                }
            self.silent_tokens.copy_(tensors["silent_tokens"])
            self.batch_threshold.copy_(tensors["batch_threshold"])
        self.steps = record["steps"]
        self.history = [(step, name, value) for step, name, value in record["history"]]

    def _tally(self, batch: Tensor, found: Losses) -> None:
        window = self._window
        window[:-4] += batch.sum(0)
        # By rows first, as everywhere: the number of threads must not move the last bits.
        window[-4] += batch.square().sum(1).sum(dtype=torch.float64)
        window[-3] += found.error
        window[-2] += found.num_active
        window[-1] += len(batch)

    def _move_threshold(self, group: Group) -> None:
        """Towards the mean, over the shares of the step, of the smallest value that was kept."""
        group.add([self._lowest])
        lowest, shares = self._lowest
        memory = _THRESHOLD_MEMORY if self.steps else 0.0
        moved = self.batch_threshold.lerp(lowest / shares.clamp(min=1), 1 - memory)
        self.batch_threshold = torch.where(shares > 0, moved, self.batch_threshold)
        self._lowest.zero_()

    def _set_learning_rate(self, total_steps: int) -> None:
        """Linear warm-up, a plateau, linear decay to zero."""
        section = self.section
        warmup = min(1.0, (self.steps + 1) / max(1.0, section.warmup_share * total_steps))
        decay = min(1.0, (total_steps - self.steps) / max(1.0, section.decay_share * total_steps))
        for group in self._optimiser.param_groups:
            group["lr"] = group["rate"] * section.learning_rate * min(warmup, decay)


def starting_directions(data: Tensor, count: int, seed: int, mean: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> Tensor:
    """Unit rows [count, C]: activations of `data` [n, C] drawn at random, each mixed with parts of a random direction.

    The activations put the rows where the data is; alone they would leave those dead that were drawn at a rare token (see
    docs/benchmarks.md). Random directions alone stand where there are too few. `mean` and `scale` [C] standardise.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(data), generator=generator)[:count]
    chosen = (data[drawn.to(data.device)] - mean) / scale
    noise = torch.randn(count, data.shape[1], generator=generator).to(data)
    noise = _RANDOM_PARTS * functional.normalize(noise, dim=1)
    noise[: len(chosen)] += functional.normalize(chosen, dim=1)
    return functional.normalize(noise, dim=1)


def flat(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several dictionaries under one name each: `NUMBER/name`."""
    return {f"{number}/{name}": tensor for number, state in enumerate(states) for name, tensor in state.items()}
