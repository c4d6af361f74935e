"""The trainers of TopK dictionaries that benchmarks put side by side, one step at a time, on the same batches.

The peers come with `make test-peers`' environment; where one is not installed it is left out.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from finescope.config import SaeSection
from finescope.sae.group import Group
from finescope.sae.trainer import Trainer, starting_directions


@dataclass(frozen=True)
class Setting:
    """What all trainers share."""

    width: int
    num_latents: int
    k: int
    batch: int
    steps: int
    learning_rate: float | None = None  # None: the trainer's own
    dead_after: int = 10_000_000  # tokens, of which a trainer that counts steps takes as many steps
    auxk: int | None = None  # None: half the width, which all three peers take


class StepTrainer(Protocol):
    """A dictionary in training."""

    def step(self, batch: Tensor) -> None:
        """One optimiser step on [batch, width]."""
        ...

    def reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction [N, width] and which latents are active, bool [N, L]."""
        ...

    def encoder_bias(self) -> Tensor:
        """[L]; benchmarks write to it."""
        ...


class Ours:
    """finescope's trainer, with all of its bookkeeping."""

    def __init__(self, setting: Setting, first: Tensor) -> None:
        section = {
            "num_latents": setting.num_latents,
            "k": setting.k,
            "batch_tokens": setting.batch,
            "auxk": setting.auxk or setting.width // 2,
            "dead_after_tokens": setting.dead_after,
        }
        rate = {} if setting.learning_rate is None else {"learning_rate": setting.learning_rate}
        self._trainer = Trainer(SaeSection.model_validate(section | rate), starting_directions(first, setting.num_latents, 0))
        self._steps, self._group = setting.steps, Group()

    def step(self, batch: Tensor) -> None:
        self._trainer.accumulate(batch, 1)
        self._trainer.step(self._group, self._steps)

    @torch.no_grad()
    def reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._trainer.weights
        pre = functional.linear(batch - weights.decoder_bias, weights.encoder_weight, weights.encoder_bias).relu()
        values, ids = pre.topk(self._trainer.section.k, dim=1)
        latents = torch.zeros_like(pre).scatter_(1, ids, values)
        return latents @ weights.decoder_weight + weights.decoder_bias, latents > 0

    def encoder_bias(self) -> Tensor:
        return self._trainer.weights.encoder_bias


class Dense:
    """The same objective by dense products and autograd, by hand, without any figures."""

    def __init__(self, setting: Setting, first: Tensor) -> None:
        directions = starting_directions(first, setting.num_latents, 0)
        self._decoder = directions.clone().requires_grad_()
        self._encoder = (0.3 * directions).requires_grad_()
        self._bias = first.new_zeros(setting.num_latents).requires_grad_()
        self._decoder_bias = first.new_zeros(setting.width).requires_grad_()
        weights = [self._encoder, self._bias, self._decoder, self._decoder_bias]
        self._optimiser = torch.optim.Adam(weights, lr=setting.learning_rate or 1e-3)
        self._setting = setting
        self._silent = torch.zeros(setting.num_latents, dtype=torch.int64)

    def step(self, batch: Tensor) -> None:
        setting = self._setting
        pre = functional.linear(batch - self._decoder_bias, self._encoder, self._bias).relu()
        values, ids = pre.topk(setting.k, dim=1)
        latents = torch.zeros_like(pre).scatter(1, ids, values)
        residual = batch - latents @ self._decoder - self._decoder_bias
        loss = residual.square().mean()
        dead = self._silent >= setting.dead_after
        if bool(dead.any()):
            most = min(setting.auxk or setting.width // 2, int(dead.sum()))
            largest = torch.where(dead, pre, -torch.inf).topk(most, dim=1)
            guess = torch.zeros_like(pre).scatter(1, largest.indices, largest.values) @ self._decoder
            target = residual.detach()
            loss = loss + (target - guess).square().sum() / target.square().sum() / 32
        loss.backward()
        self._silent += len(batch)
        self._silent[latents.detach().bool().any(0)] = 0
        with torch.no_grad():
            gradient = self._decoder.grad
            assert gradient is not None
            gradient -= (gradient * self._decoder).sum(1, keepdim=True) * self._decoder
            self._optimiser.step()
            self._optimiser.zero_grad()
            self._decoder /= self._decoder.norm(dim=1, keepdim=True)

    def reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("timed only")

    def encoder_bias(self) -> Tensor:
        return self._bias


class SaeLens:
    """SAELens's SAETrainer around its TopKTrainingSAE, a fifth of the steps decaying, as its tutorials do."""

    def __init__(self, setting: Setting, first: Tensor) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

        torch.manual_seed(0)
        config = TopKTrainingSAEConfig(d_in=setting.width, d_sae=setting.num_latents, k=setting.k)
        self._sae = TopKTrainingSAE(config)
        self._trainer: Any = SAETrainer(
            SAETrainerConfig(
                total_training_samples=setting.steps * setting.batch,
                train_batch_size_samples=setting.batch,
                lr=setting.learning_rate or 3e-4,
                lr_end=0.0,
                lr_decay_steps=setting.steps // 5,
                dead_feature_window=max(1, setting.dead_after // setting.batch),
            ),
            self._sae,
            iter(()),
        )

    def step(self, batch: Tensor) -> None:
        self._trainer.step(batch)
        self._trainer.n_training_steps += 1

    @torch.no_grad()
    def reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        latents = self._sae.encode(batch)
        return self._sae.decode(latents), latents > 0

    def encoder_bias(self) -> Tensor:
        return self._sae.b_enc


class DictionaryLearning:
    """dictionary_learning's TopKTrainer; warm-up and decay in the shares of ours, as its 1,000 steps are for long runs."""

    def __init__(self, setting: Setting, first: Tensor) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

        self._trainer = TopKTrainer(
            steps=setting.steps,
            activation_dim=setting.width,
            dict_size=setting.num_latents,
            k=setting.k,
            layer=0,
            lm_name="none",
            lr=setting.learning_rate,
            warmup_steps=max(1, setting.steps // 20),
            decay_start=int(0.7 * setting.steps),
            seed=0,
            device="cpu",
        )
        self._trainer.dead_feature_threshold = setting.dead_after
        self._steps = 0

    def step(self, batch: Tensor) -> None:
        self._trainer.update(self._steps, batch)
        self._steps += 1

    @torch.no_grad()
    def reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        latents = self._trainer.ae.encode(batch)
        return self._trainer.ae.decode(latents), latents > 0

    def encoder_bias(self) -> Tensor:
        return self._trainer.ae.encoder.bias


class Sparsify:
    """sparsify's SparseCoder with the steps that its trainer takes around it: its rate and linear warm-up and decay for Adam
    (its default optimiser is another one), the warm-up in the share of ours; Adam is torch's fused one, which is faster.
    """

    def __init__(self, setting: Setting, first: Tensor) -> None:
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

        torch.manual_seed(0)
        self._coder = SparseCoder(setting.width, SparseCoderConfig(num_latents=setting.num_latents, k=setting.k))
        self._coder.b_dec.data = first.mean(0)
        rate = setting.learning_rate or 2e-4 / (setting.num_latents / 2**14) ** 0.5
        self._optimiser = torch.optim.Adam(self._coder.parameters(), lr=rate, fused=True)
        warm, steps = max(1, setting.steps // 20), setting.steps
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        )
        self._silent = torch.zeros(setting.num_latents, dtype=torch.int64)
        self._dead_after = setting.dead_after

    def step(self, batch: Tensor) -> None:
        coder = self._coder
        coder.set_decoder_norm_to_unit_norm()
        out = coder(batch, dead_mask=self._silent >= self._dead_after)
        (out.fvu + out.auxk_loss / 32).backward()
        self._silent += len(batch)
        self._silent[out.latent_indices.flatten()] = 0
        coder.remove_gradient_parallel_to_decoder_directions()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._schedule.step()

    @torch.no_grad()
    def reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self._coder.encode(batch)
        active = torch.zeros(len(batch), self._coder.num_latents, dtype=torch.bool)
        active.scatter_(1, encoded.top_indices, encoded.top_acts > 0)
        return self._coder.decode(encoded.top_acts, encoded.top_indices), active

    def encoder_bias(self) -> Tensor:
        return self._coder.encoder.bias


class _Floor:
    """The encoder's product and the choice of the k largest: what no TopK step can do without."""

    def __init__(self, setting: Setting, first: Tensor) -> None:
        self._weight = starting_directions(first, setting.num_latents, 0)
        self._bias, self._k = first.new_zeros(setting.num_latents), setting.k

    def step(self, batch: Tensor) -> None:
        functional.linear(batch, self._weight, self._bias).topk(self._k, dim=1)

    def reconstruct(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("timed only")

    def encoder_bias(self) -> Tensor:
        return self._bias


_PACKAGES: dict[str, tuple[str, Callable[[Setting, Tensor], StepTrainer]]] = {
    "saelens": ("sae_lens", SaeLens),
    "dictionary_learning": ("dictionary_learning", DictionaryLearning),
    "sparsify": ("sparsify", Sparsify),
}
TIMED: dict[str, Callable[[Setting, Tensor], StepTrainer]] = {"ours": Ours, "dense": Dense, "floor": _Floor}


def peers() -> dict[str, Callable[[Setting, Tensor], StepTrainer]]:
    """Those that are installed."""
    return {name: make for name, (package, make) in _PACKAGES.items() if importlib.util.find_spec(package) is not None}


def silence(trainer: StepTrainer, share: float) -> None:
    """Make a share of the latents silent: their bias is low enough that none of them is among the largest."""
    bias = trainer.encoder_bias()
    assert isinstance(bias, nn.Parameter | Tensor)
    with torch.no_grad():
        bias[: int(share * len(bias))] = -100.0
