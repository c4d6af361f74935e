"""The stream of activations that dictionaries are trained on, and the shuffle buffer that it is cut into."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

# input_ids [B, T] int64 and attention_mask [B, T], padded on either side.
TokenBatch = tuple[np.ndarray, np.ndarray]

# Activations [n, C] float32 of the chunks start, start + step, ... below stop, one array a chunk, in order. The columns of
# several hook points stand side by side.
ActivationStream = Callable[[int, int, int], Iterator[np.ndarray]]


def used_positions(attention_mask: Tensor) -> Tensor:
    """[B, T] bool: tokens, but for each document's first, which is an attention sink of outlying norm (METHOD 1)."""
    mask = attention_mask.bool()
    return mask & (mask.cumsum(1) > 1)


class ShuffleBuffer:
    """One share of the stream, a buffer of a fixed size at a time: filled whole, used up, filled again.

    What has been read is known by two numbers, the chunk and the rows of it that are used, so that a training that was
    killed between two fills reads on where it was; no activation needs to be kept.
    """

    def __init__(self, stream: ActivationStream, chunks: range, rows: int, width: int, device: torch.device) -> None:
        """Read `chunks` (start, stop, step) of the stream into a buffer [rows, width] on `device`."""
        self._open, self._chunks = stream, chunks
        self._store = torch.empty(rows, width, device=device)
        self._source: Iterator[np.ndarray] | None = None
        self._rest = np.empty((0, width), np.float32)
        self.chunk, self.offset = 0, 0  # of `chunks`: the one that is read from next, and how much of it is used

    def fill(self, limit: int) -> Tensor:
        """The next rows of the share, a view [n, width] that the next fill overwrites; n = min(rows, limit) till the end."""
        wanted, filled = min(limit, len(self._store)), 0
        while filled < wanted and self._has_rows():
            part = self._rest[self.offset : self.offset + wanted - filled]
            # A copy, since a chunk may lie in memory that is shared with other processes and must not be written to.
            self._store[filled : filled + len(part)] = torch.tensor(part)
            filled += len(part)
            self.offset += len(part)
        return self._store[:filled]

    def ended(self) -> bool:
        """Whether nothing is left; reads on to know."""
        return not self._has_rows()

    def resume(self, chunk: int, offset: int) -> None:
        """Go on from where another buffer's `chunk` and `offset` stood."""
        self.chunk, self.offset, self._source = chunk, offset, None

    def close(self) -> None:
        """Let go of the stream."""
        self._source = None

    def _has_rows(self) -> bool:
        """Whether the current chunk has rows left, after moving on to the next one that has."""
        if self._source is None:
            left = self._chunks[self.chunk :]
            self._source = self._open(left.start, left.stop, left.step)
            self._rest = next(self._source, self._rest[:0])
        while self.offset >= len(self._rest) and self.chunk < len(self._chunks):
            self.chunk, self.offset = self.chunk + 1, 0
            self._rest = next(self._source, self._rest[:0])
        return self.offset < len(self._rest)
