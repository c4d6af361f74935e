"""The next token of several rows: the most likely one, or one that is drawn so that other rows have no say in it."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Chooses a token a row. The n-th choice of a row depends on its logits, its seed and n alone."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        """`seeds`: one a row. `temperature` 0 takes the most likely token and draws nothing."""
        self._temperature = temperature
        self._noise = [torch.Generator(device).manual_seed(seed) for seed in seeds] if temperature else []

    def choose(self, logits: Tensor) -> Tensor:
        """A token for each row of logits [rows, vocabulary]; [rows] int64.

        Gumbel-max: argmax of log p + g is a draw from p where each g = -log e, e exponential. A last bit of the logits, which
        differs from batch to batch, changes the token only where two sums are as near to each other as that.
        """
        if not self._temperature:
            return logits.argmax(-1)
        exponential = torch.empty(logits.shape, device=logits.device)
        for row, generator in enumerate(self._noise):
            exponential[row].exponential_(generator=generator)
        return (logits.float() / self._temperature - exponential.log_()).argmax(-1)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        if self._temperature:
            self._noise = [self._noise[row] for row in rows]
