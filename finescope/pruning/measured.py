"""What pruning took: the seconds of each part, and the peak of memory."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by part; a part inside of another does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside as `name`, on top of what counts so already."""
        began, before, self._inner = time.perf_counter(), self._inner, 0.0
        yield
        took = time.perf_counter() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner
        self._inner = before + took


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at most since this process began: resident, and of a GPU what tensors took."""
    found = {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        found["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found
