"""Where the metrics of a training go beside its own files: MLflow, Weights & Biases, TensorBoard, behind one interface."""

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

from finescope.distillation.trackers import MLflowTracker, TensorBoardTracker, TrackedRun, Tracker, Unreachable, WandbTracker
from finescope.errors import ResourceError

# What each needs of the extra `track`; MLflow without a server keeps runs in a database, for which its skinny package lacks two.
_PACKAGES = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",), "tensorboard": ("tensorboard",)}
_MAKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "mlflow": MLflowTracker,
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}
# Of a row's values, as the live line shows them.
_SHOWN = {"loss": "loss {:.2f}", "held_out_loss": "held-out {:.2f}", "learning_rate": "lr {:.1e}"}
_SHOWN |= {"tokens_per_second": "{:,.0f} tokens/s"}

_log = logging.getLogger(__name__)


def live_note(row: Mapping[str, float], lost: Sequence[str] = ()) -> str:
    """A row of the history for the live line, what it has of: "loss 2.31, held-out 2.40, lr 4.1e-05, 1,250 tokens/s, 3.1 GB".

    `lost`: trackers that could not be reached.
    """
    shown = [form.format(row[name]) for name, form in _SHOWN.items() if name in row]
    # Of a GPU's memory where there is one.
    memory = [f"{row[name] / 1e9:.1f} GB" for name in ("device_bytes", "memory_bytes") if name in row][:1]
    return ", ".join([*shown, *memory, *(f"{name} not reached" for name in lost)])


def check_trackers(names: Sequence[str]) -> None:
    """Hold the machine to what the recipe's `compute.track` needs, before anything is trained.

    Raises:
        ResourceError: a package is missing.
    """
    for name in names:
        missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise ResourceError(
                f"compute.track: {name} needs {', '.join(missing)}, which is not installed: pip install 'finescope[track]', or "
                f"leave {name} out"
            )


def open_trackers(names: Sequence[str], run: TrackedRun) -> "Trackers":
    """Begin `run` in every tracker named, or go on with it where a run of this identity is there.

    One process of a group does this; the others open none.

    Raises:
        ResourceError: a package is missing, or what a tracker is asked it refuses, such as Weights & Biases without a key.
    """
    check_trackers(names)
    trackers = Trackers()
    for name in names:
        run.directory.mkdir(parents=True, exist_ok=True)
        trackers.add(name, run)
    return trackers


class Trackers:
    """Those that were opened; one that cannot be reached is warned of once and told no more.

    A training that goes on tells its whole history again: what a tracker has, it has once. What a step is told anew after the
    training went back, TensorBoard shows in place of what it was told before, MLflow and Weights & Biases do not.
    """

    def __init__(self) -> None:
        self.lost: list[str] = []  # names of those that could not be reached
        self._open: dict[str, Tracker] = {}

    def add(self, name: str, run: TrackedRun) -> None:
        """Open one more."""
        with self._putting_up_with_silence(name):
            self._open[name] = _MAKERS[name](run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell all of one step, in order of steps. `values`: its row of the history, whose `time` is when it was done."""
        metrics = {name: value for name, value in values.items() if name != "time"}
        for name, tracker in list(self._open.items()):
            with self._putting_up_with_silence(name):
                tracker.log(step, metrics, values["time"])

    def close(self, failed: bool = False) -> None:
        """Send what is left, and say that the training is over."""
        for name in list(self._open):
            with self._putting_up_with_silence(name):
                self._open.pop(name).close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    @contextlib.contextmanager
    def _putting_up_with_silence(self, name: str) -> Iterator[None]:
        try:
            yield
        except Unreachable as error:
            self._open.pop(name, None)
            self.lost.append(name)
            _log.warning("%s cannot be reached, and is told no more of this training: %s", name, error)
