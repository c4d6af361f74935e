"""Ray Train with two CPU processes: every engine gives what the plain one gives alone."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from distillation_fixtures import distill_section, random_examples, student_directory, tiny_llama
from distillation_runs import shards_at, table_of

from finescope import storage
from finescope.checkpoints import complete_steps
from finescope.distillation.engine import Engine, EngineFactory, OptimizerSettings, PlainEngine, Sums
from finescope.distillation.job import TrainJob
from finescope.distillation.loop import train
from finescope.errors import ResourceError, StepFailed
from finescope.runners import ray_deepspeed, ray_train
from finescope.runners.base import Resources, TrainProgress

pytestmark = pytest.mark.ray
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

Progress = Callable[[int, str], Any]
Weights = dict[str, torch.Tensor]
OFFLOAD = ("none", "none", "optimizer", "all")  # by ZeRO stage


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    # Ray's sockets live below this directory and their paths may have 107 characters at most.
    root = tempfile.mkdtemp(prefix="rt", dir="/tmp")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=root)
    yield
    ray.shutdown()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return student_directory(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, student: str) -> dict[str, TrainJob]:
    """What the plain engine has done in one process, by method; of "half" only the first four steps of six."""
    jobs = {method: job_at(tmp_path_factory.mktemp(method), student, method) for method in ("lora", "full")}
    for job in jobs.values():
        train(job, PlainEngine, lambda *_: None)
    jobs["told"] = told_at(tmp_path_factory.mktemp("told"), student)
    train(jobs["told"], PlainEngine, lambda *_: None)
    jobs["half"] = job_at(tmp_path_factory.mktemp("half"), student, "lora")
    with pytest.raises(InterruptedError):
        train(jobs["half"], PlainEngine, interrupt)
    assert complete_steps(jobs["half"].checkpoints) == [2]
    return jobs


def interrupt(steps: int, note: str, done: list[int] = []) -> None:  # noqa: B006  (counts over calls)
    done.append(steps)
    if len(done) == 3:
        raise InterruptedError


def job_at(root: Path, student: str, method: str, **changes: object) -> TrainJob:
    # An odd number of documents a batch: the two processes never have equally much to do.
    section = distill_section(**{"method": method, "batch_size": 5, "micro_batch_tokens": 40, "held_out": 1, **changes})
    return TrainJob(student, random_examples(12), section, str(root / "checkpoints"), str(root / "out"))


def told_at(root: Path, student: str, **changes: object) -> TrainJob:
    """A training that a teacher takes part in."""
    job = job_at(root, student, "full", **{"kl_weight": 0.5, **changes})
    assert isinstance(job.examples, tuple)
    return replace(job, teacher=shards_at(root, table_of(job.examples, tiny_llama(seed=3))))


def weights(job: TrainJob) -> Weights:
    return load_file(Path(job.output) / "model" / "model.safetensors")


def close(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3)


def together(loop: Callable[..., None], arguments: tuple[Any, ...], zero_stage: int, notes: list[str] | None = None) -> int:
    told: list[int] = []

    def progress(amount: int, note: str = "") -> None:
        told.append(amount)
        if notes is not None:
            notes.append(note)

    ray_train.train(loop, arguments, progress, Resources(), 2, {"CPU": 1.0}, zero_stage)
    return sum(told)


def one_after_the_other(jobs: Sequence[TrainJob], spoiled: TrainJob, factory: EngineFactory, progress: Progress) -> None:
    """Several trainings in one group of processes, as it takes a while to start one."""
    for job in jobs:
        train(job, factory, progress)
    train(spoiled, _spoiling(factory, 3, 3), lambda *_: None)


def lost_and_found(lost: TrainJob, factory: EngineFactory, progress: Progress) -> None:
    """A training whose first engine never comes to a number."""
    train(lost, _spoiling(factory, 1, 10**9), progress)


def _spoiling(factory: EngineFactory, first: int, last: int) -> EngineFactory:
    """The first engine that is made is spoiled; those that follow are not."""
    spans = [(first, last)]
    return lambda module, settings: _Spoiled(factory(module, settings), *(spans.pop() if spans else (0, 0)))


class _Spoiled:
    """Makes the losses from the `first` to the `last` pass on the first process not a number, which has some in every step.

    The third belongs to the first step or the second.
    """

    def __init__(self, engine: Engine, first: int, last: int) -> None:
        self._engine, self._count, self._first, self._last = engine, 0, first, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *inputs: torch.Tensor | None) -> Sums:
        self._count += 1
        total, *parts = self._engine(*inputs)
        spoiled = self._first <= self._count <= self._last and self._engine.rank == 0
        return (total * float("nan") if spoiled else total, *parts)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_processes_equal_one(
    tmp_path: Path, session: None, student: str, alone: dict[str, TrainJob], zero_stage: int
) -> None:
    lora, full = (replace(job_at(tmp_path / method, student, method), recompute=True) for method in ("lora", "full"))
    resumed, spoiled = (job_at(tmp_path / name, student, "lora") for name in ("resumed", "spoiled"))
    told = told_at(tmp_path / "told", student, zero_stage=zero_stage, offload=OFFLOAD[zero_stage])
    shutil.copytree(alone["half"].checkpoints, resumed.checkpoints)
    assert together(one_after_the_other, ([lora, full, resumed, told], spoiled), zero_stage) == 24
    close(weights(lora), weights(alone["lora"]))
    close(weights(full), weights(alone["full"]))
    close(weights(resumed), weights(alone["lora"]))
    close(weights(told), weights(alone["told"]))
    record = storage.read_json(f"{spoiled.checkpoints}/step-00000006/done.json")
    assert record["skipped"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(spoiled).values())
    # What two processes have written, one goes on from.
    shutil.rmtree(f"{lora.checkpoints}/step-00000006")
    shutil.rmtree(lora.output)
    amounts: list[int] = []
    train(lora, PlainEngine, lambda amount, _: amounts.append(amount))
    assert amounts == [4, 1, 1]
    close(weights(lora), weights(alone["lora"]))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_an_engine_is_replaced_where_nothing_is_finite(tmp_path: Path, session: None, student: str, zero_stage: int) -> None:
    job = job_at(tmp_path, student, "lora")
    assert together(lost_and_found, (job,), zero_stage) == 6
    record = storage.read_json(f"{job.checkpoints}/step-00000006/done.json")
    assert (record["skipped"], record["rollbacks"]) == (5, 1)
    assert all(torch.isfinite(tensor).all() for tensor in weights(job).values())


def killed_once(job: TrainJob, marker: str, factory: EngineFactory, progress: Progress) -> None:
    """The process of rank 1 is killed while the fourth step is on its way, and not again in the next attempt."""

    def make(module: torch.nn.Module, settings: OptimizerSettings) -> Engine:
        engine = factory(module, settings)
        return engine if engine.rank == 0 or Path(marker).exists() else _Suicidal(engine, marker)

    train(job, make, progress)


class _Suicidal:
    def __init__(self, engine: Engine, marker: str) -> None:
        self._engine, self._marker, self._steps = engine, marker, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *inputs: torch.Tensor | None) -> Sums:
        return self._engine(*inputs)

    def step(self, learning_rate: float) -> float:
        self._steps += 1
        if self._steps == 4:
            Path(self._marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._engine.step(learning_rate)


def test_a_killed_process_is_replaced(tmp_path: Path, session: None, student: str, alone: dict[str, TrainJob]) -> None:
    job = job_at(tmp_path, student, "lora")
    assert together(killed_once, (job, str(tmp_path / "marker")), 0) == 6
    assert (tmp_path / "marker").exists()
    close(weights(job), weights(alone["lora"]))


def noting(steps: int, factory: EngineFactory, progress: TrainProgress) -> None:
    """Rank 0 alone tells, as the loop does."""
    if torch.distributed.get_rank() == 0:
        for step in range(steps):
            progress(1, f"loss {step}" if step < steps - 1 else "")


def test_the_newest_note_is_passed_on(session: None) -> None:
    notes: list[str] = []
    assert together(noting, (5,), 0, notes) == 5
    assert notes[-1] == "loss 3"


def test_a_known_failure_comes_out_as_it_was_raised(tmp_path: Path, session: None, student: str) -> None:
    job = replace(job_at(tmp_path, student, "lora"), examples=())
    with pytest.raises(StepFailed, match="no example to train on"):
        together(train, (job,), 0)


def test_missing_deepspeed_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_deepspeed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"finescope\[deepspeed\]"):
        ray_train.train(train, (), lambda *_: None, Resources(), 2, {"CPU": 1.0}, 2)


def test_scratch_of_drivers_that_were_killed_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, living, other = "finescope-train-4194305-abc", f"finescope-train-{os.getpid()}-abc", "finescope-train-notes"
    for name in (dead, living, other):
        (tmp_path / name / "training").mkdir(parents=True)
    made = Path(ray_train._scratch_directory()).name
    assert {path.name for path in tmp_path.iterdir()} == {living, other, made}
    assert made.startswith(f"finescope-train-{os.getpid()}-")
