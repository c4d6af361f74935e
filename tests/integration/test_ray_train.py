"""Ray Train with two CPU processes: every engine gives what the plain one gives alone."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from distillation_fixtures import distill_section, random_examples, student_directory

from finescope.distillation.checkpoint import complete_steps
from finescope.distillation.engine import EngineFactory, PlainEngine
from finescope.distillation.loop import TrainJob, train
from finescope.errors import ResourceError, StepFailed
from finescope.runners import ray_deepspeed, ray_train
from finescope.runners.base import Resources

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(short_directory(tmp_path_factory)))
    yield
    ray.shutdown()


def short_directory(factory: pytest.TempPathFactory) -> Path:
    # Ray's sockets live below it and their paths may have 107 characters at most.
    import tempfile

    return Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return student_directory(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, student: str) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that the plain engine gives in one process, by method."""
    found = {}
    for method in ("lora", "full"):
        job = job_at(tmp_path_factory.mktemp(method), student, method)
        train(job, PlainEngine, lambda _: None)
        found[method] = weights(job)
    return found


def job_at(root: Path, student: str, method: str, **changes: object) -> TrainJob:
    # An odd number of documents a batch: the two processes never have equally much to do.
    section = distill_section(method=method, batch_size=5, micro_batch_tokens=40, **changes)
    return TrainJob(student, random_examples(12), section, str(root / "checkpoints"), str(root / "out"))


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    return load_file(Path(job.output) / "model" / "model.safetensors")


def together(job: TrainJob, zero_stage: int, loop: Callable[..., None] = train) -> int:
    told: list[int] = []
    ray_train.train(loop, (job,), told.append, Resources(), 2, False, zero_stage)
    return sum(told)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_processes_equal_one(
    tmp_path: Path, session: None, student: str, alone: dict[str, dict[str, torch.Tensor]], zero_stage: int, method: str
) -> None:
    job = job_at(tmp_path, student, method)
    assert together(job, zero_stage) == 6
    found = weights(job)
    assert found.keys() == alone[method].keys()
    for name, tensor in alone[method].items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3)
