"""What pruning took: the seconds of each part, by its parts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
