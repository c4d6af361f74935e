"""The runner on Ray: joins the cluster that the recipe or RAY_ADDRESS names, else starts one on this machine."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

# Ray reports usage over the network unless told not to; a tool that runs at night on other people's data does not.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.exceptions

from finescope.config import ComputeSection
from finescope.errors import ResourceError
from finescope.runners import ray_data, ray_train
from finescope.runners.base import Progress, Reporter, Resources, Result, Source, TableWorker, TrainProgress

# Of a CPU or GPU that a process which trains shares with an actor that feeds it.
_TRAINING_PART = 0.6
# What every worker of the run sees, on every node; and what it sees of the driver's: names that begin so.
_WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
_PASSED_ON = ("FINESCOPE_", "HF_", "TRANSFORMERS_", "MLFLOW_", "WANDB_")


class RayRunner:
    """Ray Data for what goes over the corpus, one task for what needs one machine, Ray Train for training."""

    name = "ray"

    def __init__(self, compute: ComputeSection, reporter: Reporter) -> None:
        self._compute = compute
        self._started_here = not ray.is_initialized()
        if self._started_here:
            self._connect(compute.address or os.environ.get("RAY_ADDRESS"), reporter)

    @property
    def _gpus(self) -> float:
        """Of the cluster as it is now; of one that has yet to grow, what the recipe says an actor takes."""
        stated = self._compute.gpus_per_actor
        return max(float(ray.cluster_resources().get("GPU", 0)), 0.0 if stated == "auto" else stated)

    def _connect(self, address: str | None, reporter: Reporter) -> None:
        variables = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        runtime = {"env_vars": {**_WORKER_ENVIRONMENT, **variables}}
        # Inside a job the job's own runtime environment is already there, and Ray merges the two.
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": runtime}
        try:
            if address:
                ray.init(address=address, **settings)
                reporter.note(f"joined the Ray cluster at {address}")
            else:
                ray.init(address="local", include_dashboard=False, **settings)
                reporter.note(f"started Ray on this machine with {int(ray.cluster_resources().get('CPU', 0))} CPUs")
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"the Ray cluster at '{address}'" if address else "Ray on this machine"
            raise ResourceError(f"cannot reach {where} (compute.address, RAY_ADDRESS): {error}") from error

    def map(
        self, worker: Callable[..., TableWorker], arguments: tuple[Any, ...], units: pa.Table, resources: Resources
    ) -> Iterator[pa.Table]:
        """See `Runner.map`. `compute.actors: auto` takes what the cluster has and can grow to."""
        options = self._options(resources)
        stated = self._compute.actors
        # The pool's upper end is the number of units: an autoscaling cluster grows until they are all at work.
        actors = (1, max(units.num_rows, 1)) if stated == "auto" else (stated, stated)
        with _plain_errors():
            yield from ray_data.map_units(worker, arguments, units, actors, options, units_at_once=resources.units_at_once)

    def call(
        self, function: Callable[..., Result], arguments: tuple[Any, ...], progress: Progress, resources: Resources
    ) -> Result:
        """See `Runner.call`."""
        with _plain_errors():
            return ray_data.call_remote(function, arguments, progress, self._whole_machine(resources))

    def train(
        self,
        loop: Callable[..., None],
        arguments: tuple[Any, ...],
        progress: TrainProgress,
        resources: Resources,
        zero_stage: int,
    ) -> None:
        """See `Runner.train`. `compute.train_workers: auto` is one worker a GPU, or two on CPUs alone."""
        workers = self._compute.train_workers
        if workers == "auto":
            workers = int(self._gpus) or min(2, int(ray.cluster_resources().get("CPU", 1)))
        with _plain_errors():
            per_worker = {"CPU": 1.0, "GPU": 1.0} if self._gpus else {"CPU": 1.0}
            ray_train.train(loop, arguments, progress, resources, workers, per_worker, zero_stage)

    def train_on_stream(
        self,
        loop: Callable[..., None],
        arguments: tuple[Any, ...],
        source: Source,
        workers: int,
        progress: TrainProgress,
        resources: Resources,
    ) -> None:
        """See `Runner.train_on_stream`.

        Each process has a pool of actors of its own, which grows as for `map`. Where the cluster has too few CPUs or GPUs
        for a whole one for each process and each pool, a process and an actor share one.
        """
        options = self._options(source.resources)
        per_worker: dict[str, float] = {}
        for kind, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")) if self._gpus else (("CPU", "num_cpus"),):
            per_worker[kind] = 1.0
            if self._shared(kind, workers):
                # Two processes that train never share one: NCCL refuses that.
                per_worker[kind] = _TRAINING_PART
                options[key] = min(options[key], 1.0 - _TRAINING_PART)
        stated = self._compute.actors
        # The pool's least is one: more may not fit beside what trains.
        actors = (1, max(source.units.num_rows, 1) if stated == "auto" else max(1, stated // workers))
        stream = ray_data.UnitStream(source, actors, options)
        with _plain_errors():
            ray_train.train(_Streamed(loop), (*arguments, stream), progress, resources, workers, per_worker, 0)

    def _shared(self, kind: str, workers: int) -> bool:
        """Whether processes that train and actors must share CPUs or GPUs. A cluster that was joined may yet grow.

        Raises:
            ResourceError: this machine has fewer than there are processes.
        """
        there = float(ray.cluster_resources().get(kind, 0))
        if there < workers and self._started_here:
            raise ResourceError(f"sae.workers: {workers} processes need as many {kind}s; this machine has {there:g}")
        return workers <= there < 2 * workers

    def close(self) -> None:
        """Shut down the session where this runner began it; a cluster that was joined stays."""
        if self._started_here:
            ray.shutdown()

    def _whole_machine(self, resources: Resources) -> dict[str, Any]:
        """As `_options`; without a GPU one machine's CPUs, as nothing else of the run is at work meanwhile."""
        options = self._options(resources)
        if not options["num_gpus"]:
            cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
            options["num_cpus"] = max([options["num_cpus"], *cpus])
        return options

    def _options(self, resources: Resources) -> dict[str, Any]:
        gpus = self._compute.gpus_per_actor
        if gpus == "auto":
            gpus = 1.0 if self._gpus and resources.accelerator else 0.0
        options: dict[str, Any] = {"num_cpus": self._compute.cpus_per_actor, "num_gpus": gpus}
        stated = self._compute.memory_per_actor_gb
        memory = int(stated * 1e9) if stated else resources.memory_bytes
        return {**options, "memory": memory} if memory else options


class _Streamed:
    """A loop that takes a stream, as a loop that takes an engine, for which it has no use."""

    def __init__(self, loop: Callable[..., None]) -> None:
        self._loop = loop

    def __call__(self, *arguments: Any) -> None:
        *given, _engine_factory, progress = arguments
        self._loop(*given, progress)


class _plain_errors:
    """Let an error of a worker come out as it was raised there, without the frames that Ray put around it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            cause = getattr(error, "cause", None) or error.__cause__
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, Exception):
                raise cause
            if not isinstance(cause, BaseException):
                return
            error = cause
