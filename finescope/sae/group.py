"""The processes that train a dictionary together, seen from one of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


class Group:
    """torch's default process group, or this process alone. Every method is called by all, in the same order."""

    def __init__(self) -> None:
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if grouped else 0
        self.size = distributed.get_world_size() if grouped else 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def either(self, flags: Tensor) -> Tensor:
        """Of bool flags: which are set in any process."""
        if self.size == 1:
            return flags
        counts = flags.to(torch.uint8)
        distributed.all_reduce(counts, op=distributed.ReduceOp.MAX)
        return counts.bool()

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of the processes' numbers."""
        if self.size == 1:
            return number
        least = torch.tensor(number, device=device)
        distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
        return int(least)

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor by that of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def all_rows(self, row: Sequence[int], device: torch.device) -> list[list[int]]:
        """The row of every process, by rank; all are of one length."""
        if self.size == 1:
            return [list(row)]
        mine = torch.tensor(list(row), device=device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(rows, mine)
        return [item.tolist() for item in rows]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()
