"""What a stage may ask of the machines it runs on. Stages know these protocols and no backend."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa

Result = TypeVar("Result")


class Progress(Protocol):
    """Tells of work done; rate and time left follow from it."""

    def __call__(self, amount: int, /) -> None: ...


class TrainProgress(Protocol):
    """As `Progress`, with a short note of how a training stands, in one line; the newest one counts, "" leaves it as it is."""

    def __call__(self, amount: int, note: str = "", /) -> None: ...


class TableWorker(Protocol):
    """A batch function as a class: the constructor loads, the call maps a table to a table. No Ray in it."""

    def __call__(self, batch: pa.Table, /) -> pa.Table: ...


@dataclass(frozen=True)
class Resources:
    """What one worker needs."""

    memory_bytes: int = 0  # resident memory, estimated; 0: not known
    accelerator: bool = True  # whether a GPU helps
    # Units that a worker may be given at a time, by as many threads; more than one, and it guards what they share.
    units_at_once: int = 1


# Results of the units start, start + step, ... below stop, in order.
TableStream = Callable[[int, int, int], Iterator[pa.Table]]


@dataclass(frozen=True)
class Source:
    """Work whose results a training uses up while it goes on: `worker(*arguments)` is applied to each row of `units`."""

    worker: Callable[..., TableWorker]
    arguments: tuple[Any, ...]
    units: pa.Table
    resources: Resources
    bytes_ahead: int  # results that may wait for each process of the training, about


class Runner(Protocol):
    """Where the work runs: `local` is one process and the reference, `ray` a cluster. Results are the same."""

    name: str

    def map(
        self, worker: Callable[..., TableWorker], arguments: tuple[Any, ...], units: pa.Table, resources: Resources
    ) -> Iterator[pa.Table]:
        """Apply `worker(*arguments)` to the rows of `units`, one row a call, on as many workers as there are.

        A worker is called by one thread at a time, or by up to `resources.units_at_once`.

        Yields what the calls return, in any order.
        """
        ...

    def call(
        self, function: Callable[..., Result], arguments: tuple[Any, ...], progress: Progress, resources: Resources
    ) -> Result:
        """Run `function(*arguments, progress)` once, on a machine that has what it needs."""
        ...

    def train(
        self,
        loop: Callable[..., None],
        arguments: tuple[Any, ...],
        progress: TrainProgress,
        resources: Resources,
        zero_stage: int,
    ) -> None:
        """Run `loop(*arguments, engine_factory, progress)` on every worker of a training group.

        The loop keeps its own checkpoints on storage, so that the same call after a crash goes on where it was.
        """
        ...

    def train_on_stream(
        self,
        loop: Callable[..., None],
        arguments: tuple[Any, ...],
        source: Source,
        workers: int,
        progress: TrainProgress,
        resources: Resources,
    ) -> None:
        """Run `loop(*arguments, stream, progress)` on every one of `workers` processes of a training group, or on one.

        `stream` is a `TableStream` of the results of `source`, which are computed while the loop runs, on as many workers
        as there are. The loop keeps its own checkpoints on storage, as for `train`.
        """
        ...

    def close(self) -> None:
        """Give back what was started."""
        ...


class Reporter(Protocol):
    """Tells the person who runs it what is going on; on stderr, in colour or as JSON lines."""

    def task(self, name: str, total: int | None, unit: str) -> AbstractContextManager[TrainProgress]:
        """A long piece of work of `total` units ('documents', 'tokens'), with its rate and the time left."""
        ...

    def note(self, message: str) -> None:
        """Something that a person should know."""
        ...

    def warn(self, message: str) -> None:
        """Something that a person should look at."""
        ...


@dataclass(frozen=True)
class Context:
    """What every stage is given beside its sections and inputs."""

    runner: Runner
    reporter: Reporter
