"""Losses that are not finite: skipped, counted, gone back from, and given up on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from distillation_fixtures import student_directory
from distillation_runs import Killed, equal, job_at, killer, weights

from finescope.distillation.checkpoint import weights_of
from finescope.distillation.engine import OptimizerSettings, PlainEngine, Sums
from finescope.distillation.job import TrainJob, learning_rate
from finescope.distillation.loop import MAX_ROLLBACKS, MAX_SKIPPED_IN_A_ROW, train
from finescope.errors import StepFailed


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield student_directory(tmp_path_factory.mktemp("student"))
    torch.set_num_threads(threads)


class NonFiniteAt(PlainEngine):
    """Spoils the loss of the calls that are named."""

    calls: tuple[int, ...] = ()
    count = 0

    def __call__(self, *inputs: torch.Tensor | None) -> Sums:
        total, *parts = super().__call__(*inputs)
        self.count += 1
        return (total * float("nan") if self.count in self.calls else total, *parts)


def spoiled(*calls: tuple[int, ...]) -> Callable[[torch.nn.Module, OptimizerSettings], NonFiniteAt]:
    """Engines whose forward passes of these numbers give a loss that is not a number: the first engine's, the second's..."""
    left = list(calls)

    def factory(module: torch.nn.Module, settings: OptimizerSettings) -> NonFiniteAt:
        engine = NonFiniteAt(module, settings)
        engine.calls = left.pop(0) if left else ()
        return engine

    return factory


@pytest.mark.parametrize("calls", [(2,), (1, 2, 3, 4)])
def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path, student: str, calls: tuple[int, ...]) -> None:
    job = job_at(tmp_path, student, micro_batch_tokens=4096)
    train(job, spoiled(calls), lambda *_: None)
    record = json.loads((Path(job.checkpoints) / "step-00000006" / "done.json").read_text())
    assert (record["skipped"], record["rollbacks"]) == (len(calls), 0)
    assert all(torch.isfinite(tensor).all() for tensor in weights(job).values())


def test_after_a_few_in_a_row_the_weights_go_back_and_the_data_goes_on(tmp_path: Path, student: str) -> None:
    # Twelve steps, a checkpoint every second: five that are not finite from the fourth on, so back to step 2, at step 8.
    job = job_at(tmp_path, student, micro_batch_tokens=4096, epochs=4)
    reached: list[dict[str, torch.Tensor]] = []

    class Recording(NonFiniteAt):
        def load(self, directory: Path) -> None:
            super().load(directory)
            reached.append(self.trainable())

    engines = [(4, 5, 6, 7, 8), ()]

    def factory(module: torch.nn.Module, settings: OptimizerSettings) -> Recording:
        engine = Recording(module, settings)
        engine.calls = engines.pop(0)
        return engine

    train(job, factory, lambda *_: None)
    record = json.loads((Path(job.checkpoints) / "step-00000012" / "done.json").read_text())
    assert (record["step"], record["skipped"], record["rollbacks"]) == (12, 5, 1)
    rates = [row["learning_rate"] for row in record["metrics"]]
    expected = [learning_rate(step, 12, 1e-2, 0.1) * (0.5 if step >= 8 else 1.0) for step in range(12)]
    assert rates == pytest.approx(expected)
    # The checkpoint of step 6 was written while steps were skipped: its weights are those after step 3.
    third = job_at(tmp_path / "third", student, micro_batch_tokens=4096, epochs=4, checkpoint_steps=3)
    with pytest.raises(Killed):
        train(third, PlainEngine, killer(3))
    (found,) = reached
    assert equal(found, weights_of(third.checkpoints, 3))


def test_a_training_that_stays_non_finite_fails_with_the_reason(tmp_path: Path, student: str) -> None:
    job = job_at(tmp_path, student, micro_batch_tokens=4096, epochs=9)
    always = tuple(range(1, 99))
    with pytest.raises(StepFailed, match=f"{MAX_SKIPPED_IN_A_ROW} training steps in a row"):
        train(job, spoiled(*[always] * (MAX_ROLLBACKS + 1)), lambda *_: None)


def test_killed_after_a_rollback_equals_undisturbed(tmp_path: Path, student: str) -> None:
    def run(job: TrainJob, calls: tuple[int, ...], kill: int | None) -> None:
        train(job, spoiled(calls), killer(kill) if kill else lambda *_: None)

    calm, shot = (job_at(tmp_path / name, student, micro_batch_tokens=4096, epochs=4) for name in ("calm", "shot"))
    run(calm, (3, 4, 5, 6, 7), None)
    with pytest.raises(Killed):
        run(shot, (3, 4, 5, 6, 7), 9)
    run(shot, (), None)
    assert equal(weights(calm), weights(shot))
