"""What pruning took: the seconds of each part, and the peak of memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Measured where models are, as a training asks for it too.
from finescope.models.memory import peak_memory as peak_memory


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
