"""Trainings of a tiny student that are killed and what is left of them; what a teacher says of its examples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from distillation_fixtures import distill_section, random_examples
from safetensors.torch import load_file

from finescope import schemas, storage
from finescope.distillation.examples import Example
from finescope.distillation.job import TrainJob

TOP_K = 200  # of 259 tokens


class Killed(BaseException):
    """As sudden as a signal: nothing in the project may catch it."""


def killer(after: int) -> Callable[[int, str], None]:
    done = 0

    def progress(steps: int, note: str) -> None:
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


def table_of(examples: tuple[Example, ...], teacher: torch.nn.Module) -> pa.Table:
    """What a teacher says of the examples, with a document that was dropped before each."""
    rows = []
    for number, example in enumerate(examples):
        with torch.no_grad():
            logits = teacher(input_ids=torch.from_numpy(example.tokens.astype(np.int64))[None]).logits[0]
        logprobs = logits[example.loss_start - 1 : -1].log_softmax(-1)
        top, ids = logprobs.topk(TOP_K)
        others = logprobs.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        stored = torch.cat([top, others], 1).half()
        rows.append({"doc_id": f"dropped-{number}", "targets": 0, "ids": [], "logprobs": []})
        targets = {"targets": len(ids), "ids": ids.flatten().tolist(), "logprobs": stored.flatten().numpy()}
        rows.append({"doc_id": str(number), **targets})
    return pa.Table.from_pylist(rows, schema=schemas.TEACHER_LOGPROBS)


def shards_at(root: Path, table: pa.Table) -> tuple[str, ...]:
    found = []
    for number, start in enumerate(range(0, table.num_rows, 5)):
        found.append(str(root / f"part-{number}.parquet"))
        storage.put_parquet(found[-1], table.slice(start, 5))
    return tuple(found)
