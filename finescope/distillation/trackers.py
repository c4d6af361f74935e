"""MLflow, Weights & Biases and TensorBoard, each as a `Tracker`. Their packages are imported where a run is opened."""

import contextlib
import importlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finescope.errors import ResourceError

_IDENTITY_TAG = "finescope.identity"
# MLflow's codes of what never came to an answer, or was not let in; all others are about what was asked.
_NOT_REACHED = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED")
_MLFLOW_PARAMS = 100  # that a request may have
_WANDB_FINISH_S = 300.0  # in which what is left is sent; a server that is gone would else hold up the end without limit
_TENSORBOARD_FLUSH_S = 30


@dataclass(frozen=True)
class TrackedRun:
    """A training as trackers show it."""

    project: str
    name: str
    identity: str  # a hash: a training that was killed and goes on has the same one
    settings: Mapping[str, str | float | bool | None]
    directory: Path  # local; for those that write files


class Unreachable(Exception):
    """A tracker's server or files cannot be reached. It is put up with: charts are not worth a training."""


class Tracker(Protocol):
    """One place. All methods raise `Unreachable` where there is no getting through to it."""

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Tell of one step, which was done at `seconds` since 1970."""
        ...

    def close(self, failed: bool) -> None:
        """Send what is left."""
        ...


class MLflowTracker:
    """A run of an MLflow server (MLFLOW_TRACKING_URI), or else of a database in the run's directory."""

    def __init__(self, run: TrackedRun) -> None:
        # Like Ray's, its reports of usage go out unless it is told not to.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        entities = _module("mlflow.entities")
        with _mlflow_errors():
            self._client = _module("mlflow").MlflowClient(
                os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.directory.resolve()}/mlflow.db"
            )
            found = self._client.get_experiment_by_name(run.project)
            experiment = found.experiment_id if found else self._client.create_experiment(run.project)
            runs = self._client.search_runs([experiment], f"tags.`{_IDENTITY_TAG}` = '{run.identity}'", max_results=1)
            if runs:
                self._run = runs[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
            else:
                self._run = self._client.create_run(experiment, tags={_IDENTITY_TAG: run.identity}, run_name=run.name).info.run_id
                settings = [entities.Param(name, str(value)) for name, value in run.settings.items()]
                for start in range(0, len(settings), _MLFLOW_PARAMS):
                    self._client.log_batch(self._run, params=settings[start : start + _MLFLOW_PARAMS])
            # The last step that it has of each metric: it would keep and draw a second value beside the first.
            self._told = {name: self._last_step(name) for name in runs[0].data.metrics} if runs else {}
        # It tries a server that does not answer again for minutes, which no step of the training waits for.
        self._thread, self._sent = ThreadPoolExecutor(1, "mlflow"), deque[Future[Any]]()

    def _last_step(self, name: str) -> int:
        return max(metric.step for metric in self._client.get_metric_history(self._run, name))

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """See `Tracker`."""
        self._raise_what_failed(wait=False)
        new = [name for name in values if step > self._told.get(name, -1)]
        if new:
            metric = _module("mlflow.entities").Metric
            metrics = [metric(name, values[name], int(seconds * 1000), step) for name in new]
            self._told.update(dict.fromkeys(new, step))
            self._sent.append(self._thread.submit(self._client.log_batch, self._run, metrics=metrics))

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._raise_what_failed(wait=True)
        self._thread.shutdown()
        with _mlflow_errors():
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _raise_what_failed(self, wait: bool) -> None:
        try:
            with _mlflow_errors():
                while self._sent and (wait or self._sent[0].done()):
                    self._sent.popleft().result()
        except (Unreachable, ResourceError):
            self._thread.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _mlflow_errors() -> Iterator[None]:
    try:
        yield
    except _module("mlflow.exceptions").MlflowException as error:
        if error.error_code not in _NOT_REACHED:
            raise ResourceError(f"compute.track: mlflow refuses: {_first_line(error)}") from error
        raise Unreachable(_first_line(error)) from error


class WandbTracker:
    """A run of Weights & Biases; it sends from a process of its own, and tries again by itself."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = _module("wandb")
        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                id=run.identity,
                resume="allow",
                config=dict(run.settings),
                dir=str(run.directory),
                settings=wandb.Settings(console="off", finish_timeout=_WANDB_FINISH_S),
            )
        except wandb.errors.CommError as error:
            raise Unreachable(_first_line(error)) from error
        except wandb.errors.UsageError as error:  # no key, and nothing that an hour's wait would mend
            raise ResourceError(f"compute.track: wandb refuses: {_first_line(error)}") from error
        self._next = self._run.step  # it refuses, with a warning each, the steps before

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """See `Tracker`."""
        if step >= self._next:
            self._run.log({**values, "_timestamp": seconds}, step=step, commit=True)
            self._next = step + 1

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run's directory."""

    def __init__(self, run: TrackedRun) -> None:
        self._directory = run.directory / "tensorboard" / f"{run.name}-{run.identity[:8]}"
        self._settings = json.dumps(dict(run.settings), indent=2)
        self._writer: Any = None
        self._last = -1

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """See `Tracker`."""
        with _file_errors():
            if self._writer is None or step <= self._last:
                self._writer = self._begin(step)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step, walltime=seconds)
        self._last = step

    def _begin(self, step: int) -> Any:
        """A new file, which takes back what earlier ones have of this step and those after it."""
        if self._writer is not None:
            self._writer.close()
        first = not self._directory.exists()
        summary_writer = _module("torch.utils.tensorboard").SummaryWriter
        writer = summary_writer(str(self._directory), purge_step=step, flush_secs=_TENSORBOARD_FLUSH_S)
        if first:
            writer.add_text("settings", f"```\n{self._settings}\n```", 0)
        return writer

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        with _file_errors():
            if self._writer is not None:
                self._writer.close()


@contextlib.contextmanager
def _file_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unreachable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _module(name: str) -> Any:
    # Of an optional package: not there for a type checker, nor for who tracks nothing.
    return importlib.import_module(name)
