"""Trainings of a tiny student that are killed, and what is left of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from distillation_fixtures import distill_section, random_examples
from safetensors.torch import load_file

from finescope.distillation.job import TrainJob


class Killed(BaseException):
    """As sudden as a signal: nothing in the project may catch it."""


def killer(after: int) -> Callable[[int], None]:
    done = 0

    def progress(steps: int) -> None:
        nonlocal done
        done += steps
        if done >= after:
            raise Killed

    return progress


def job_at(root: Path, student: str, **changes: object) -> TrainJob:
    return TrainJob(student, random_examples(12), distill_section(**changes), str(root / "checkpoints"), str(root / "out"))


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    return load_file(Path(job.output) / "model" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
