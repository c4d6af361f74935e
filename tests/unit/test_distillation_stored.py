"""The teacher's distributions from storage to the loss."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from distillation_fixtures import distill_section, random_examples, student_directory, tiny_llama
from distillation_runs import shards_at, table_of
from torch import Tensor

from finescope import schemas, storage
from finescope.distillation.batches import Step, collate, passes_of, plan_steps
from finescope.distillation.engine import PlainEngine
from finescope.distillation.examples import Example
from finescope.distillation.job import TrainJob
from finescope.distillation.loop import train
from finescope.distillation.stored import StoredTeacher
from finescope.errors import StepFailed


def test_what_the_teacher_says_stands_at_its_targets(tmp_path: Path) -> None:
    # The teacher's best token is made the target itself, so that each can be told from the others.
    examples = random_examples(13)
    rows = []
    for example in examples:
        following = example.tokens[example.loss_start :].tolist()
        rows.append({"doc_id": "", "targets": len(following), "ids": following, "logprobs": [-0.5, -1.0] * len(following)})
    shards = shards_at(tmp_path, pa.Table.from_pylist(rows, schema=schemas.TEACHER_LOGPROBS))
    stored = StoredTeacher(shards, examples, tmp_path)
    for step in plan_steps(examples, np.arange(13), 6, 1, 0, 150):  # the last example is cut short
        for rows_of_pass in passes_of(step, 0, 1, 64, True):
            targets = collate(examples, step, rows_of_pass).targets
            ids, logprobs = stored.of_pass(examples, step, rows_of_pass)
            assert ids[:, 0].tolist() == targets[targets != -100].tolist()
            assert logprobs.shape == (len(ids), 2)
    ids, logprobs = stored.of_pass(examples, Step(np.array([0]), np.array([4])), [])
    assert (ids.shape, logprobs.shape) == ((0, 1), (0, 2))


def test_rows_of_other_examples_are_refused(tmp_path: Path) -> None:
    shards = shards_at(tmp_path, table_of(random_examples(6), tiny_llama()))
    with pytest.raises(StepFailed, match="not of the examples"):
        StoredTeacher(shards, random_examples(6, seed=1), tmp_path)


def divergence(student: str, teacher: torch.nn.Module, examples: tuple[Example, ...]) -> float:
    """The mean KL(teacher || student) over the whole vocabulary at what is trained on."""
    from transformers import AutoModelForCausalLM

    model, total, count = AutoModelForCausalLM.from_pretrained(student), 0.0, 0
    for example in examples:
        ids, where = torch.from_numpy(example.tokens.astype(np.int64))[None], slice(example.loss_start - 1, -1)
        with torch.no_grad():
            p, q = (_logprobs(network, ids)[where] for network in (teacher, model))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


def _logprobs(network: torch.nn.Module, ids: Tensor) -> Tensor:
    return network(input_ids=ids).logits[0].log_softmax(-1)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_training_on_the_divergence_alone_leads_to_the_teacher(tmp_path: Path, kind: str) -> None:
    student, teacher, examples = student_directory(tmp_path / "student"), tiny_llama(seed=3), random_examples(24)
    shards = shards_at(tmp_path, table_of(examples, teacher))
    changes = {"method": "full", "kl_weight": 1.0, "kl_divergence": kind, "epochs": 20, "batch_size": 8}
    job = TrainJob(student, examples, distill_section(**changes), str(tmp_path / "c"), str(tmp_path / "out"), teacher=shards)
    train(job, PlainEngine, lambda *_: None)
    before, after = (divergence(place, teacher, examples) for place in (student, f"{job.output}/model"))
    assert after < 0.5 * before
    rows = storage.read_parquet(f"{job.output}/metrics/part-00000.parquet").to_pylist()
    told = [row["value"] for row in rows if row["name"] == "divergence"]
    assert told[-1] < 0.5 * told[0]
    assert {"cross_entropy", "loss"} <= {row["name"] for row in rows}


def test_the_text_alone_counts_without_a_weight(tmp_path: Path) -> None:
    student, examples = student_directory(tmp_path / "student"), random_examples(8)
    job = TrainJob(student, examples, distill_section(), str(tmp_path / "c"), str(tmp_path / "out"))
    train(job, PlainEngine, lambda *_: None)
    told = replace(job, teacher=("nowhere.parquet",), checkpoints=str(tmp_path / "c2"), output=str(tmp_path / "out2"))
    train(told, PlainEngine, lambda *_: None)
    one, other = (storage.read_parquet(f"{j.output}/metrics/part-00000.parquet") for j in (job, told))
    losses = [[row["value"] for row in table.to_pylist() if row["name"] == "loss"] for table in (one, other)]
    assert losses[0] == losses[1]
