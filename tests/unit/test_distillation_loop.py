"""The loop with the plain engine: killed and resumed equals undisturbed, to the last bit."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distillation_fixtures import random_examples, student_directory
from distillation_runs import Killed, equal, job_at, killer, weights
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finescope import schemas, storage
from finescope.checkpoints import complete_steps
from finescope.distillation.checkpoint import weights_of
from finescope.distillation.engine import PlainEngine
from finescope.distillation.examples import to_table
from finescope.distillation.job import learning_rate, plan
from finescope.distillation.loop import train
from finescope.errors import StepFailed


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield student_directory(tmp_path_factory.mktemp("student"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kills", [(1,), (3, 4), (2, 3, 6)])
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, student: str, method: str, kills: tuple[int, ...]) -> None:
    calm = job_at(tmp_path / "calm", student, method=method)
    train(calm, PlainEngine, lambda *_: None)
    shot = job_at(tmp_path / "shot", student, method=method)
    for after in kills:
        with pytest.raises(Killed):
            train(shot, PlainEngine, killer(after))
    told: list[int] = []
    train(shot, PlainEngine, lambda amount, _: told.append(amount))
    assert sum(told) == len(plan(shot).steps) == 6
    assert equal(weights(calm), weights(shot))
    assert complete_steps(shot.checkpoints) == [6, 4]


def test_real_kill(tmp_path: Path, student: str) -> None:
    job = job_at(tmp_path / "shot", student)
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    script = (
        "import os, pickle, signal, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from finescope.distillation.loop import train\n"
        "from finescope.distillation.engine import PlainEngine\n"
        "done = 0\n"
        "def progress(n, note):\n"
        "    global done\n"
        "    done += n\n"
        "    if done == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(pickle.load(open(sys.argv[1], 'rb')), PlainEngine, progress)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "job")], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert complete_steps(job.checkpoints) == [2]
    assert not storage.exists(storage.join(job.output, "model"))
    train(job, PlainEngine, lambda *_: None)
    calm = job_at(tmp_path / "calm", student)
    train(calm, PlainEngine, lambda *_: None)
    assert equal(weights(calm), weights(job))


def test_half_written_checkpoint_does_not_count(tmp_path: Path, student: str) -> None:
    job = job_at(tmp_path, student)
    with pytest.raises(Killed):
        train(job, PlainEngine, killer(4))
    (Path(job.checkpoints) / "step-00000004" / "done.json").unlink()
    told: list[int] = []
    train(job, PlainEngine, lambda amount, _: told.append(amount))
    assert told == [2, 1, 1, 1, 1]


def test_checkpoint_of_other_examples_is_refused(tmp_path: Path, student: str) -> None:
    job = job_at(tmp_path, student)
    with pytest.raises(Killed):
        train(job, PlainEngine, killer(2))
    with pytest.raises(StepFailed, match="another training"):
        train(replace(job, examples=random_examples(12, seed=5)), PlainEngine, lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_is_a_stock_directory_with_its_adapter_beside(tmp_path: Path, dtype: torch.dtype) -> None:
    student = student_directory(tmp_path / "student", dtype)
    job = job_at(tmp_path, student)
    uri = str(tmp_path / "examples.parquet")
    storage.put_parquet(uri, to_table(job.examples))
    job = replace(job, examples=uri)
    train(job, PlainEngine, lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(f"{job.output}/model")
    base = AutoModelForCausalLM.from_pretrained(student)
    assert model.dtype == base.dtype == dtype
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(f"{job.output}/model").chat_template
    assert (Path(job.output) / "model" / "generation_config.json").exists()
    ids = torch.randint(3, 259, (1, 8))
    assert not torch.equal(model(ids).logits, base(ids).logits)
    with_adapter = PeftModel.from_pretrained(base, f"{job.output}/adapter")
    torch.testing.assert_close(with_adapter(ids).logits, model(ids).logits, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    table = storage.read_parquet(f"{job.output}/metrics/part-00000.parquet")
    assert table.schema == schemas.METRICS
    losses = [row["value"] for row in table.to_pylist() if row["name"] == "loss"]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_cap_on_tokens(tmp_path: Path, student: str) -> None:
    job = replace(job_at(tmp_path, student), cap_tokens=100)
    train(job, PlainEngine, lambda *_: None)
    assert plan(job).tokens <= 100
    record = json.loads((Path(job.checkpoints) / f"step-{len(plan(job).steps):08d}" / "done.json").read_text())
    assert record["tokens"] == plan(job).tokens


def test_held_out_examples_are_measured_and_not_trained_on(tmp_path: Path, student: str) -> None:
    job = replace(job_at(tmp_path, student, held_out=2), examples=random_examples(24))
    train(job, PlainEngine, lambda *_: None)
    planned = plan(job)
    assert len(planned.held_out) == 2
    assert not {*planned.held_out} & {int(index) for step in planned.steps for index in step.indices}
    rows = storage.read_parquet(f"{job.output}/metrics/part-00000.parquet").to_pylist()
    measured = [row["value"] for row in rows if row["name"] == "held_out_loss"]
    assert len(measured) == math.ceil(len(planned.steps) / 2)
    record = json.loads((Path(job.checkpoints) / f"step-{len(planned.steps):08d}" / "done.json").read_text())
    assert record["best_loss"] == min(measured)


def test_patience_ends_the_training_with_the_best_weights(tmp_path: Path, student: str) -> None:
    # Random tokens cannot be learned: what is held out gets worse as what is trained on gets better.
    changes = {"method": "full", "held_out": 3, "patience": 2, "epochs": 30}
    job = replace(job_at(tmp_path, student, **changes), examples=random_examples(30))
    told: list[int] = []
    train(job, PlainEngine, lambda amount, _: told.append(amount))
    steps = complete_steps(job.checkpoints)
    record = json.loads((Path(job.checkpoints) / f"step-{steps[0]:08d}" / "done.json").read_text())
    assert sum(told) == len(plan(job).steps) > steps[0]
    assert record["without_gain"] == 2
    assert record["best_step"] == steps[0] - 4
    assert steps == [steps[0], steps[0] - 2, steps[0] - 4]
    told_of = json.loads(Path(job.record).read_text())
    assert (told_of["training_steps"], told_of["result_step"]) == (steps[0], record["best_step"])
    assert told_of["best_held_out_loss"] == record["best_loss"] < told_of["held_out_loss"]
    best = {name.removeprefix("causal."): value for name, value in weights_of(job.checkpoints, record["best_step"]).items()}
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(job).items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputed_activations_change_nothing(tmp_path: Path, student: str, method: str) -> None:
    kept, again = (replace(job_at(tmp_path / str(r), student, method=method), recompute=r) for r in (False, True))
    for job in (kept, again):
        train(job, PlainEngine, lambda *_: None)
    assert equal(weights(kept), weights(again))


def test_packed_rows_take_the_same_steps(tmp_path: Path, student: str) -> None:
    packed, padded = (job_at(tmp_path / str(p), student, micro_batch_tokens=512, packing=p) for p in (True, False))
    for job in (packed, padded):
        train(job, PlainEngine, lambda *_: None)
    for name, tensor in weights(padded).items():
        torch.testing.assert_close(weights(packed)[name], tensor, atol=1e-4, rtol=1e-3)


def test_micro_batches_do_not_change_the_gradient(tmp_path: Path, student: str) -> None:
    one, many = (job_at(tmp_path / str(budget), student, micro_batch_tokens=budget) for budget in (4096, 33))
    for job in (one, many):
        train(job, PlainEngine, lambda *_: None)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(many)[name], tensor, atol=1e-5, rtol=1e-4)


def test_nothing_to_train_on(tmp_path: Path, student: str) -> None:
    with pytest.raises(StepFailed, match="no example"):
        train(replace(job_at(tmp_path, student), examples=()), PlainEngine, lambda *_: None)


def test_schedule_by_hand() -> None:
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[9] > 0
