"""Checkpoints of a training: complete ones only, the newest first, the last two kept."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finescope import storage
from finescope.distillation.engine import Engine
from finescope.errors import StepFailed

DONE = "done.json"
KEPT = 2
_NAME = re.compile(r"step-(\d{8})/" + re.escape(DONE) + "$")


@dataclass(frozen=True)
class Cursor:
    """Where a training stands. With the weights and the optimiser it is all that the rest depends on.

    There is no random state in it: what is random in a step is drawn from (seed, step), so that a training that was
    killed goes on alike with any number of processes.
    """

    job: str  # fingerprint of the plan and the examples
    step: int  # steps that are done, skipped ones included
    skipped: int  # of these, steps without an update
    skipped_in_a_row: int
    tokens: int  # trained on, padding not counted
    metrics: tuple[dict[str, float], ...]  # a row a step


def save(engine: Engine, uri: str, cursor: Cursor) -> None:
    """Write a checkpoint below `uri`: its files first, the record that makes it count last. All ranks call."""
    target = storage.join(uri, f"step-{cursor.step:08d}")
    with storage.scratch_directory(target) as directory:
        directory.mkdir(parents=True)
        engine.save(directory)
        if engine.rank == 0:
            storage.put_tree(directory, target)
            storage.put_json(storage.join(target, DONE), asdict(cursor))
            for step in complete_steps(uri)[KEPT:]:
                _delete(uri, step)
    engine.sum([0.0])  # a barrier: nobody goes on before it is there


def load_newest(engine: Engine, uri: str, job: str) -> Cursor | None:
    """Bring the engine to the newest complete checkpoint below `uri`; None where there is none. All ranks call.

    Raises:
        StepFailed: it belongs to other examples or another plan.
    """
    steps = complete_steps(uri)
    engine.sum([0.0])  # a barrier: all have looked before anyone writes
    if not steps:
        return None
    source = storage.join(uri, f"step-{steps[0]:08d}")
    record: dict[str, Any] = storage.read_json(storage.join(source, DONE))
    cursor = Cursor(**{**record, "metrics": tuple(record["metrics"])})
    if cursor.job != job:
        raise StepFailed(f"the checkpoint '{source}' belongs to another training; remove '{uri}' to start afresh")
    with storage.local_directory(source) as directory:
        engine.load(Path(directory))
    return cursor


def complete_steps(uri: str) -> list[int]:
    """The steps of the complete checkpoints below `uri`, newest first."""
    found = (_NAME.search(file.path) for file in storage.glob(uri))
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def _delete(uri: str, step: int) -> None:
    directory = storage.join(uri, f"step-{step:08d}")
    # The record first: a checkpoint that is half gone must not count.
    storage.delete(storage.join(directory, DONE))
    storage.delete(directory)
