"""`train` on a Ray cluster: Ray Train's TorchTrainer around a loop that knows nothing of Ray."""

import contextlib
import functools
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from torch import distributed

from finescope.distillation.engine import PlainEngine
from finescope.errors import StepFailed, UserError
from finescope.runners.base import Resources, TrainProgress
from finescope.runners.ray_deepspeed import DeepSpeedEngine, check_installed

# Worker groups that may be lost; each time the loop goes on from its newest checkpoint.
_MAX_FAILURES = 3
_POLL_SECONDS = 0.5
_SCRATCH = "finescope-train-"  # and the driver's process id
_TIMEOUT_SECONDS = 86_400
_FAILURE_POLLS = 20  # how long a process that failed waits for the others to fail alike


def train(
    loop: Callable[..., None],
    arguments: tuple[Any, ...],
    progress: TrainProgress,
    resources: Resources,
    workers: int,
    per_worker: dict[str, float],
    zero_stage: int,
) -> None:
    """Run `loop(*arguments, engine_factory, progress)` on `workers` processes that train together; see `Runner.train`.

    Each has the CPUs and GPUs of `per_worker`. `zero_stage` 0 is the plain engine, 1 to 3 DeepSpeed's. What rank 0 tells
    `progress` is told here while it trains; steps that are done again after a failure are told once, with a note of their own.

    Raises:
        ResourceError: DeepSpeed is asked for and missing.
        StepFailed: the loop failed, or its processes died more often than is put up with.
    """
    if zero_stage:
        check_installed()
    # It may be on a node that goes away. One that starts again has forgotten all and is soon told how much is done.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    relay: Any = _Relay.options(**options).remote()  # pyright: ignore[reportAttributeAccessIssue]
    # Ray Train keeps nothing of ours there: checkpoints are the loop's own. It wants a place to write all the same.
    scratch = _scratch_directory()
    gpus = "GPU" in per_worker
    memory = {"memory": float(resources.memory_bytes)} if resources.memory_bytes else {}
    trainer = TorchTrainer(
        _work,
        train_loop_config={"call": (loop, arguments), "relay": relay, "zero_stage": zero_stage},
        # Processes may wait for each other as long as one of them is fed; Ray sees itself when one dies.
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=_TIMEOUT_SECONDS),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker={**per_worker, **memory}),
        run_config=RunConfig(
            name="training",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
            # Before the process imports anything: transformers imports DeepSpeed, which looks for a GPU at once.
            worker_runtime_env={"env_vars": {} if gpus else {"DS_ACCELERATOR": "cpu"}},
        ),
    )
    try:
        with _listening(relay, progress):
            trainer.fit()
        state: _State = ray.get(relay.state.remote())
        if state.failure is not None:
            raise pickle.loads(state.failure)
    except TrainingFailedError as error:
        raise _plain(error, relay) from error
    finally:
        ray.kill(relay)
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch_directory() -> str:
    """A directory of this process, made after those that drivers which were killed have left."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}[0-9]*-*"):
        with contextlib.suppress(PermissionError):  # another user's
            try:
                os.kill(int(left.name.split("-")[2]), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-")


class _State(NamedTuple):
    """What the relay knows."""

    done: int
    note: str  # the newest
    failure: bytes | None


@ray.remote
class _Relay:
    """What the processes tell the driver, kept where both can reach it and where it outlives a worker group."""

    def __init__(self) -> None:
        self._done, self._note = 0, ""
        self._failure: bytes | None = None
        self._failed: set[int] = set()

    def advance(self, done: int, note: str) -> None:
        """Rank 0 of some attempt has done so much in all, and how it stands."""
        self._done, self._note = max(self._done, done), note or self._note

    def fail(self, rank: int, failure: bytes) -> int:
        """A process failed for a reason that another attempt would meet again; the pickled exception.

        Returns how many processes have.
        """
        self._failure = self._failure or failure
        self._failed.add(rank)
        return len(self._failed)

    def state(self) -> _State:
        """What has been done, how it stands, and the failure if there was one."""
        return _State(self._done, self._note, self._failure)


def _work(config: dict[str, Any]) -> None:
    """One process of the group."""
    (loop, arguments), relay, zero_stage = config["call"], config["relay"], config["zero_stage"]
    state: _State = ray.get(relay.state.remote())
    if state.failure is not None:
        return
    done = 0

    def progress(amount: int, note: str = "") -> None:
        nonlocal done
        done += amount
        relay.advance.remote(done, note)

    try:
        loop(*arguments, functools.partial(DeepSpeedEngine, zero_stage) if zero_stage else PlainEngine, progress)
    except (StepFailed, UserError) as error:
        if not _all_failed(relay, error):
            # The others wait for this process: Ray Train ends them when it raises, and the next attempt ends at once.
            raise
    # The last word is on its way when the process ends; this waits for it.
    ray.get(relay.state.remote())


def _all_failed(relay: Any, error: Exception) -> bool:
    """Record the failure; whether all processes have one, so that Ray Train need not be told of any and does not retry."""
    rank, failure = distributed.get_rank(), pickle.dumps(error)
    for _ in range(_FAILURE_POLLS):
        if ray.get(relay.fail.remote(rank, failure)) == distributed.get_world_size():
            return True
        time.sleep(_POLL_SECONDS)
    return False


@contextlib.contextmanager
def _listening(relay: Any, progress: TrainProgress) -> Iterator[None]:
    """Pass on what the relay is told, from a thread, until the context ends and once more then."""
    ended = threading.Event()

    def listen() -> None:
        done, note = 0, ""
        while True:
            last = ended.wait(_POLL_SECONDS)
            state: _State = ray.get(relay.state.remote())
            # A relay that was lost and started again knows less until it is told.
            if state.done > done or state.note not in ("", note):
                progress(max(0, state.done - done), state.note)
                done, note = max(done, state.done), state.note
            if last:
                return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _plain(error: TrainingFailedError, relay: Any) -> Exception:
    """The failure as the process itself put it, without Ray's frames."""
    state: _State = ray.get(relay.state.remote())
    if state.failure is not None:
        return pickle.loads(state.failure)
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, cause = min(error.worker_failures.items())
        return StepFailed(f"training failed {_MAX_FAILURES + 1} times, lastly on process {rank}: {_last_line(cause)}")
    return StepFailed(f"training could not go on: {_last_line(error)}")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
