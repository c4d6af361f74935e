"""Fraction of variance unexplained, over a whole set: the same whatever the batches it comes in."""

import math

import torch
from torch import Tensor


class FvuMeter:
    """FVU = sum ||a - a_hat||^2 / sum ||a - mean(a)||^2 (METHOD 2), the mean being that of all that was seen."""

    def __init__(self) -> None:
        self.count = 0
        self._error = 0.0
        self._mean: Tensor | None = None  # [C] float64
        self._spread = 0.0  # sum of squared distances to the mean

    def update(self, activations: Tensor, reconstruction: Tensor) -> None:
        """Take a batch, both [N, C]."""
        if not len(activations):
            return
        batch = activations.detach().double()
        # By rows first: a long sum is split among the threads, and their number would move the last bits.
        self._error += float((batch - reconstruction.detach().double()).square().sum(1).sum())
        mean = batch.mean(0)
        spread = float((batch - mean).square().sum(1).sum())
        if self._mean is None:
            self._mean = torch.zeros_like(mean)
        # Chan et al. 1979: merging two sets' sums of squares without the cancellation of E[x^2] - E[x]^2.
        total = self.count + len(batch)
        apart = mean - self._mean
        self._spread += spread + float(apart.square().sum()) * self.count * len(batch) / total
        self._mean += apart * (len(batch) / total)
        self.count = total

    @property
    def value(self) -> float:
        """The FVU of all that was seen; not a number where that has no variance."""
        return self._error / self._spread if self._spread > 0 else math.nan
