"""Hidden states at every block boundary, in memory or, where they are too many, in a file."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor


class HiddenStates:
    """Tensors that are put by once and taken back once each, on the CPU.

    In a file they are read and written, not mapped: pages of a mapped file count as memory of the process.
    """

    def __init__(self, file: Any) -> None:
        """`file`: open for reading and writing bytes, empty; None: they stay in memory."""
        self._file = file
        self._held: dict[tuple[int, int], Tensor] = {}
        self._places: dict[tuple[int, int], tuple[int, torch.Size, torch.dtype]] = {}

    def put(self, layer: int, batch: int, hidden: Tensor) -> None:
        """Keep what `batch` is before block `layer`, of any shape and dtype."""
        if self._file is None:
            self._held[layer, batch] = hidden
            return
        self._places[layer, batch] = (self._file.tell(), hidden.shape, hidden.dtype)
        self._file.write(_bytes(hidden.contiguous()))

    def take(self, layer: int, batch: int) -> Tensor:
        """Give back what `put` was given, and forget it."""
        if self._file is None:
            return self._held.pop((layer, batch))
        place, shape, dtype = self._places.pop((layer, batch))
        hidden = torch.empty(shape, dtype=dtype)
        self._file.seek(place)
        self._file.readinto(_bytes(hidden))
        return hidden


@contextmanager
def hidden_states(spill_to: Path | None) -> Iterator[HiddenStates]:
    """In a file of the directory `spill_to`, which has no name and is gone whatever ends this process; None: in memory."""
    with nullcontext() if spill_to is None else TemporaryFile(dir=spill_to) as file:
        yield HiddenStates(file)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
