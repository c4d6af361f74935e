"""`map` and `call` on a Ray cluster: Ray Data with a pool of actors, and one remote task."""

import logging
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources
from ray.data.context import DEFAULT_ACTOR_POOL_UTIL_UPSCALING_THRESHOLD
from ray.data.read_api import from_blocks
from ray.util.queue import Empty, Queue

from finescope.runners.base import Progress, Result, Source, TableWorker

# Loading a large model takes minutes, in which Ray Data sees no progress.
_NO_PROGRESS_TIMEOUT_S = 3600
# Units that an actor has been given: one that waits costs nothing where it is at work on the other, and another actor the end.
_UNITS_IN_FLIGHT = 2
# Columns of a table of one row that carries an exception from a worker, or a whole table.
_FAILURE, _TABLE = "__failure", "__table"


def map_units(
    worker: Callable[..., TableWorker],
    arguments: tuple[Any, ...],
    units: pa.Table,
    actors: tuple[int, int],
    options: dict[str, Any],
    bytes_ahead: int | None = None,
    units_at_once: int = 1,
) -> Iterator[pa.Table]:
    """Apply `worker(*arguments)` to each row of `units` on a pool of `actors` (least, most), in any order.

    `options` are an actor's resources: num_cpus, num_gpus, memory (bytes). With `bytes_ahead` there is one result a unit,
    in the order of the units, and about so many bytes of them may wait in Ray's object store. An actor is at work on
    `units_at_once` of them, each in a thread.
    """
    if units.num_rows == 0:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = bytes_ahead is not None
    limits = ExecutionResources(object_store_memory=bytes_ahead) if bytes_ahead else ExecutionResources()
    context.execution_options.resource_limits = limits
    context.wait_for_min_actors_s = _NO_PROGRESS_TIMEOUT_S
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = _NO_PROGRESS_TIMEOUT_S
    # The pool grows where every actor has as many units as it may be given.
    threshold = _UNITS_IN_FLIGHT / max(units_at_once, 1)
    context.autoscaling_config.actor_pool_util_upscaling_threshold = min(threshold, DEFAULT_ACTOR_POOL_UTIL_UPSCALING_THRESHOLD)
    least, most = min(actors[0], units.num_rows), min(actors[1], units.num_rows)
    # One block a unit: a unit is what an actor takes at a time, and what is done again when the actor is lost. from_arrow would
    # run a task a unit first, for which a process that trains may have left no CPU.
    dataset = from_blocks([units.slice(index, 1) for index in range(units.num_rows)]).map_batches(
        _Adapter,
        fn_constructor_args=(worker, arguments, bytes_ahead is not None),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=least,
            max_size=most,
            max_tasks_in_flight_per_actor=max(_UNITS_IN_FLIGHT, units_at_once),
            max_concurrent_calls_per_actor=units_at_once,
            enable_true_multi_threading=units_at_once > 1,
        ),
        **options,
    )
    _quiet()
    # A block comes when its unit is done; nothing is fetched ahead, as the blocks are records of a few bytes.
    records: Iterator[Any] = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    for record in records:
        if _FAILURE in record.column_names:
            raise pickle.loads(record.column(_FAILURE)[0].as_py())
        yield record if bytes_ahead is None else _unpacked(record)


class UnitStream:
    """A `TableStream` that any process of the cluster can be sent: it has a pool of actors for as long as it is read."""

    def __init__(self, source: Source, actors: tuple[int, int], options: dict[str, Any]) -> None:
        """`actors` (least, most) and their `options`, as for `map_units`."""
        self._source, self._actors, self._options = source, actors, options

    def __call__(self, start: int, stop: int, step: int) -> Iterator[pa.Table]:
        """See `TableStream`."""
        source = self._source
        units = source.units.take(pa.array(range(start, stop, step), pa.int64()))
        return map_units(source.worker, source.arguments, units, self._actors, self._options, source.bytes_ahead)


def _quiet() -> None:
    """Keep Ray Data's account of its execution to its log file: our own progress and errors say what it would."""
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL + 1)


class _Adapter:
    """A table worker as Ray Data wants it. What the worker raises travels to the driver as data.

    Ray Data would wrap an exception of a call in several of its own, and lose that of a constructor; and it would do
    again what failed for a reason. A worker that dies is Ray's to replace.
    """

    def __init__(self, worker: Callable[..., TableWorker], arguments: tuple[Any, ...], packed: bool) -> None:
        """`packed`: results travel as one row each. Ray Data cuts large tables in parts and drops empty ones."""
        self._make, self._packed = (worker, arguments), packed
        self._worker: TableWorker | None = None
        self._making = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            with self._making:
                if self._worker is None:
                    worker, arguments = self._make
                    self._worker = worker(*arguments)
            result = self._worker(batch)
            return _packed(result) if self._packed else result
        except Exception as error:  # noqa: BLE001  (raised again in the driver)
            error.add_note(traceback.format_exc())
            return pa.table({_FAILURE: pa.array([_pickled(error)], pa.binary())})


def _packed(table: pa.Table) -> pa.Table:
    """A table as one row: its Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.table({_TABLE: pa.array([memoryview(sink.getvalue())], pa.large_binary())})


def _unpacked(record: pa.Table) -> pa.Table:
    """What `_packed` packed, without a copy."""
    return pa.ipc.open_stream(record.column(_TABLE)[0].as_buffer()).read_all()


def _pickled(error: Exception) -> bytes:
    """The exception, or one that says the same where it cannot travel."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # noqa: BLE001  (any class may fail to be pickled in any way)
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def call_remote(
    function: Callable[..., Result], arguments: tuple[Any, ...], progress: Progress, options: dict[str, Any]
) -> Result:
    """Run `function(*arguments, progress)` as one Ray task; its progress is told here while it runs."""
    # Its node may go away: it is started again on another, and who speaks to it waits.
    queue = Queue(actor_options={"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1})
    ended = threading.Event()
    listener = threading.Thread(target=_listen, args=(queue, progress, ended), daemon=True)
    listener.start()
    try:
        task = ray.remote(_call).options(max_retries=3, **options)
        return ray.get(task.remote(function, arguments, queue))
    finally:
        ended.set()
        listener.join()
        queue.shutdown(force=True)  # an actor that may start again does so after any other end


def _call(function: Callable[..., Result], arguments: tuple[Any, ...], queue: Queue) -> Result:
    return function(*arguments, queue.put)


def _listen(queue: Queue, progress: Progress, ended: threading.Event) -> None:
    while True:
        try:
            progress(queue.get(timeout=0.5))
        except Empty:
            if ended.is_set():
                return
