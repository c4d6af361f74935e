"""Checkpoints of a training of a student: where it stands, and the engine's weights and optimiser."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from finescope import checkpoints
from finescope.distillation.engine import Engine, load_state
from finescope.errors import StepFailed


@dataclass(frozen=True)
class Cursor:
    """Where a training stands. With the weights and the optimiser it is all that the rest depends on.

    There is no random state in it: what is random in a step is drawn from (seed, step), so that a training that was
    killed goes on alike with any number of processes.
    """

    job: str  # fingerprint of the plan and the examples
    step: int = 0  # steps that are done, skipped ones included
    skipped: int = 0  # of these, steps without an update
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # how often the weights went back to a checkpoint
    tokens: int = 0  # trained on, padding not counted
    best_step: int | None = None  # whose checkpoint has the lowest loss on the held-out examples
    best_loss: float | None = None
    without_gain: int = 0  # checkpoints since then
    metrics: tuple[dict[str, float], ...] = ()  # a row a step


def save(engine: Engine, uri: str, cursor: Cursor) -> None:
    """Write a checkpoint below `uri`. All ranks call."""
    checkpoints.save(uri, cursor.step, asdict(cursor), engine.save, first=engine.rank == 0, keep=cursor.best_step)
    engine.sum([0.0])  # a barrier: nobody goes on before it is there


def load_newest(engine: Engine, uri: str, job: str) -> Cursor | None:
    """Bring the engine to the newest complete checkpoint below `uri`; None where there is none. All ranks call.

    Raises:
        StepFailed: it belongs to other examples or another plan.
    """
    steps = checkpoints.complete_steps(uri)
    engine.sum([0.0])  # a barrier: all have looked before anyone writes
    if not steps:
        return None
    record: dict[str, Any] = checkpoints.read_record(uri, steps[0])
    cursor = Cursor(**{**record, "metrics": tuple(record["metrics"])})
    if cursor.job != job:
        raise StepFailed(f"the newest checkpoint in '{uri}' belongs to another training; remove it to start afresh")
    with checkpoints.files_of(uri, steps[0]) as directory:
        engine.load(directory)
    return cursor


def weights_of(uri: str, step: int) -> dict[str, Tensor]:
    """The trainable weights by name, whole, fp32, that the checkpoint of `step` holds."""
    with checkpoints.files_of(uri, step) as directory:
        return load_state(directory)[0]
