"""One process, no Ray: the reference that every other runner must equal."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from finescope.distillation.engine import PlainEngine
from finescope.runners.base import Progress, Resources, Result, Source, TableWorker, TrainProgress


class LocalRunner:
    """Everything in this process, one unit after the other."""

    name = "local"

    def map(
        self, worker: Callable[..., TableWorker], arguments: tuple[Any, ...], units: pa.Table, resources: Resources
    ) -> Iterator[pa.Table]:
        """See `Runner.map`. The worker is made when the first unit needs it and dropped after the last."""
        if units.num_rows == 0:
            return
        instance = worker(*arguments)
        for index in range(units.num_rows):
            yield instance(units.slice(index, 1))

    def call(
        self, function: Callable[..., Result], arguments: tuple[Any, ...], progress: Progress, resources: Resources
    ) -> Result:
        """See `Runner.call`."""
        return function(*arguments, progress)

    def train(
        self,
        loop: Callable[..., None],
        arguments: tuple[Any, ...],
        progress: TrainProgress,
        resources: Resources,
        zero_stage: int,
    ) -> None:
        """See `Runner.train`. One process has nothing to shard: the plain engine, whatever the ZeRO stage."""
        loop(*arguments, PlainEngine, progress)

    def train_on_stream(
        self,
        loop: Callable[..., None],
        arguments: tuple[Any, ...],
        source: Source,
        workers: int,
        progress: TrainProgress,
        resources: Resources,
    ) -> None:
        """See `Runner.train_on_stream`. This process is all of the group, and computes what it is about to use."""
        worker: list[TableWorker] = []

        def stream(start: int, stop: int, step: int) -> Iterator[pa.Table]:
            for index in range(start, stop, step):
                if not worker:
                    worker.append(source.worker(*source.arguments))
                yield worker[0](source.units.slice(index, 1))

        loop(*arguments, stream, progress)

    def close(self) -> None:
        """Nothing was started."""
