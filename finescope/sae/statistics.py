"""How often and how strongly each latent is active, over a whole set: the same whatever the batches it comes in."""

import math

import pyarrow as pa
import torch
from torch import Tensor

from finescope import schemas
from finescope.sae.naming import DENSE_FREQUENCY

# Latents of so many bytes (float32) exist at a time: 65,536 latents of a batch of 4,096 tokens would be a gigabyte.
_LATENT_BYTES = 64 * 2**20


class LatentStatistics:
    """Sums over a set of activations, one entry a latent, from which its metrics follow. A latent is active above 0.

    Counts and maxima are exact; the sums are float64. Metrics of an empty set are not a number.
    """

    count: int  # activations seen
    active: Tensor  # [L] int64: activations on which the latent is active
    total: Tensor  # [L] float64: sum of its values
    largest: Tensor  # [L] float32: the largest of them, 0 where it was never active

    def __init__(self, num_latents: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.active = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.total = torch.zeros(num_latents, dtype=torch.float64, device=device)
        self.largest = torch.zeros(num_latents, dtype=torch.float32, device=device)

    @property
    def num_latents(self) -> int:
        """L."""
        return len(self.active)

    def update(self, latents: Tensor) -> None:
        """Take the dense latents [N, L] of N activations, all >= 0."""
        assert latents.shape[1:] == self.active.shape, (tuple(latents.shape), self.num_latents)
        if not len(latents):
            return
        self.count += len(latents)
        self.active += (latents > 0).sum(0)
        self.total += latents.sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, latents.amax(0).float())

    def update_sparse(self, ids: Tensor, values: Tensor) -> None:
        """Take the sparse codes of N activations: int64 [N, k] and [N, k] >= 0; what is not named, or 0, is not active.

        No id twice in a row.
        """
        assert ids.shape == values.shape, (tuple(ids.shape), tuple(values.shape))
        self.count += len(ids)
        flat_ids, flat_values = ids.flatten(), values.flatten()
        self.active += torch.bincount(flat_ids[flat_values > 0], minlength=self.num_latents)
        self.total += torch.bincount(flat_ids, weights=flat_values.double(), minlength=self.num_latents)
        self.largest.scatter_reduce_(0, flat_ids, flat_values.float(), "amax")

    def merge(self, other: "LatentStatistics") -> None:
        """Take what another one has seen of the same latents."""
        assert other.num_latents == self.num_latents, (other.num_latents, self.num_latents)
        self.count += other.count
        self.active += other.active.to(self.active.device)
        self.total += other.total.to(self.total.device)
        self.largest = torch.maximum(self.largest, other.largest.to(self.largest.device))

    @property
    def frequency(self) -> Tensor:
        """[L] float64: the share of activations on which each latent is active."""
        return self.active.double() / (self.count or math.nan)

    @property
    def mean_active(self) -> Tensor:
        """[L] float64: mean of each latent's values where it is active; not a number where it never was."""
        return self.total / self.active

    @property
    def l0(self) -> float:
        """Active latents an activation, on the average."""
        return int(self.active.sum()) / (self.count or math.nan)

    @property
    def dead_share(self) -> float:
        """The share of latents that are active on none of the set: more of them the smaller it is."""
        return float((self.frequency == 0).double().mean()) if self.count else math.nan

    @property
    def dense_share(self) -> float:
        """The share of latents that are active on more than `DENSE_FREQUENCY` of the activations."""
        return float((self.frequency > DENSE_FREQUENCY).double().mean()) if self.count else math.nan


def latent_chunks(activations: Tensor, num_latents: int) -> tuple[Tensor, ...]:
    """[N, d_in] -> parts of it, in their order, whose dense latents are a moderate number of bytes each."""
    return activations.split(max(1, _LATENT_BYTES // (4 * num_latents)))


def latents_table(dictionary: str, statistics: LatentStatistics) -> pa.Table:
    """`schemas.LATENTS`, a row a latent in their order; mean and largest activation are null where it was never active."""
    active = statistics.active.cpu().numpy()
    dead = active == 0
    table = pa.table(
        {
            "dictionary": pa.repeat(pa.scalar(dictionary), len(active)),
            "latent": pa.array(range(len(active)), pa.int32()),
            "active": pa.array(active),
            "frequency": pa.array(statistics.frequency.cpu().numpy()),
            "mean_activation": pa.array(statistics.mean_active.float().cpu().numpy(), mask=dead),
            "max_activation": pa.array(statistics.largest.cpu().numpy(), mask=dead),
        }
    )
    return schemas.conform(table, schemas.LATENTS)
