"""The training loop: one code for every engine, killed and resumed with the same result."""

import datetime
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from finescope import directories, schemas, storage
from finescope.config import DistillSection
from finescope.distillation import checkpoint
from finescope.distillation.checkpoint import Cursor
from finescope.distillation.engine import Engine, EngineFactory, OptimizerSettings
from finescope.distillation.examples import (
    Example,
    Step,
    collate,
    from_table,
    loss_tokens,
    micro_batches,
    plan_steps,
)
from finescope.distillation.student import load_student, save_student
from finescope.errors import StepFailed

# Skipping a step now and then is harmless; this many in a row mean that the weights or the data are broken.
MAX_SKIPPED_IN_A_ROW = 5


@dataclass(frozen=True)
class TrainJob:
    """One training of one student, wherever it runs. Pickles small when the examples are on storage."""

    student: str  # directory of a stock Hugging Face model with its tokenizer: local path or URI
    examples: str | tuple[Example, ...]  # URI of a Parquet file of `examples.SCHEMA`, or the examples themselves
    section: DistillSection
    checkpoints: str  # URI of a directory of this job's own
    output: str  # URI; gets model/, metrics/ and, with LoRA, adapter/
    cap_tokens: int | None = None  # end after exactly so many tokens (padding not counted) instead of after `epochs`


@dataclass(frozen=True)
class Training:
    """What a job amounts to before it runs."""

    examples: tuple[Example, ...]
    steps: list[Step] = field(repr=False)

    @property
    def tokens(self) -> int:
        """Tokens read in all, padding not counted; the `cap_tokens` of a control that is to see as many."""
        return sum(step.tokens for step in self.steps)


def plan(job: TrainJob) -> Training:
    """The examples and the steps of a job; progress goes up to `len(plan(job).steps)`.

    Raises:
        StepFailed: there is no example to train on.
    """
    examples = from_table(storage.read_parquet(job.examples)) if isinstance(job.examples, str) else job.examples
    section = job.section
    steps = plan_steps(examples, section.batch_size, section.epochs, section.seed, job.cap_tokens)
    if not steps:
        raise StepFailed("distillation has no example to train on")
    return Training(examples, steps)


def train(job: TrainJob, engine_factory: EngineFactory, progress: Callable[[int], Any]) -> None:
    """Train, checkpoint, merge and write `output`; after a crash the same call goes on from the newest checkpoint.

    All processes of the group call it. `progress` is told of steps on rank 0; those of an earlier attempt come first.

    Raises:
        StepFailed: nothing to train on, or losses or gradients that stay non-finite.
    """
    training, section = plan(job), job.section
    with directories.local_directory(job.student) as directory:
        torch.manual_seed(section.seed)
        student = load_student(Path(directory), section.method, section.rank, section.seed)
        engine = engine_factory(student, OptimizerSettings(section.weight_decay, section.max_grad_norm))
        if engine.rank == 0:
            directories.delete_temporaries(job.checkpoints)
        identity = _fingerprint(job, training)
        cursor = checkpoint.load_newest(engine, job.checkpoints, identity) or Cursor(identity, 0, 0, 0, 0, ())
        if cursor.step and engine.rank == 0:
            progress(cursor.step)
        while cursor.step < len(training.steps):
            cursor = _step(engine, training, section, cursor)
            if cursor.step % section.checkpoint_steps == 0 or cursor.step == len(training.steps):
                checkpoint.save(engine, job.checkpoints, cursor)
            if engine.rank == 0:
                progress(1)
        _write(job, engine, cursor, Path(directory))


def learning_rate(step: int, steps: int, peak: float, warmup_share: float) -> float:
    """Of step 0..steps-1: a linear rise over the first `warmup_share`, then a cosine that would be 0 at `steps`."""
    warmup = math.ceil(warmup_share * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _step(engine: Engine, training: Training, section: DistillSection, cursor: Cursor) -> Cursor:
    """One optimiser step. The gradient is that of the mean loss over the targets of the whole batch, all processes'."""
    began, step = time.monotonic(), training.steps[cursor.step]
    # Seeded here and not once: what a step draws then depends on neither kills nor on the steps before it.
    torch.manual_seed(int(np.random.SeedSequence([section.seed, cursor.step, engine.rank]).generate_state(1)[0]))
    targets_in_all = loss_tokens(training.examples, step)
    loss_sum, padded = 0.0, 0
    batches = micro_batches(step, engine.rank, engine.world_size, section.micro_batch_tokens)
    for number, positions in enumerate(batches, start=1):
        tokens, targets = collate(training.examples, step, positions)
        loss = engine(torch.from_numpy(tokens).to(engine.device), torch.from_numpy(targets).to(engine.device))
        engine.backward(loss / targets_in_all, last=number == len(batches))
        loss_sum += float(loss.detach())
        padded += tokens.size
    rate = learning_rate(cursor.step, len(training.steps), section.learning_rate, section.warmup_share)
    norm = engine.step(rate)
    loss_sum, padded_in_all = engine.sum([loss_sum, float(padded)])
    loss_mean = loss_sum / targets_in_all
    skipped = not math.isfinite(norm)
    in_a_row = cursor.skipped_in_a_row + 1 if skipped else 0
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise StepFailed(
            f"{in_a_row} training steps in a row had a loss or gradient that is not finite (loss {loss_mean}, gradient "
            f"norm {norm}, step {cursor.step + 1} of {len(training.steps)}); a lower learning_rate may help"
        )
    row = {
        "loss": loss_mean,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens_per_second": step.tokens / (time.monotonic() - began),
        "padding_share": 1.0 - step.tokens / padded_in_all,
        "skipped": float(skipped),
        "time": time.time(),
    }
    return Cursor(
        job=cursor.job,
        step=cursor.step + 1,
        skipped=cursor.skipped + skipped,
        skipped_in_a_row=in_a_row,
        tokens=cursor.tokens + step.tokens,
        metrics=(*cursor.metrics, row),
    )


def metrics_table(rows: Sequence[dict[str, float]]) -> pa.Table:
    """The history as `schemas.METRICS`: the values of a step stand together, steps in order."""
    long = [(name, row[name], row["time"]) for row in rows for name in row if name != "time"]
    names, values, seconds = zip(*long, strict=True) if long else ((), (), ())
    times = [datetime.datetime.fromtimestamp(second, tz=datetime.UTC) for second in seconds]
    table = pa.table({"step": ["distill"] * len(long), "name": names, "value": values, "time": times})
    return schemas.conform(table, schemas.METRICS)


def _write(job: TrainJob, engine: Engine, cursor: Cursor, student: Path) -> None:
    # Collective, as sharded engines gather the weights; only rank 0 has something to write.
    weights = engine.trainable()
    if engine.rank == 0:
        storage.put_parquet(storage.join(job.output, "metrics", "part-00000.parquet"), metrics_table(cursor.metrics))
        with directories.scratch_directory(storage.join(job.output, "model")) as scratch:
            save_student(student, weights, job.section.method, job.section.rank, job.student, scratch)
            for name in ("adapter", "model"):
                if (scratch / name).is_dir():
                    directories.put_tree(scratch / name, storage.join(job.output, name))
    engine.sum([0.0])  # a barrier: no process ends before the result is there


def _fingerprint(job: TrainJob, training: Training) -> str:
    # What a checkpoint must share with the job that goes on from it.
    digest = hashlib.sha256(job.section.model_dump_json().encode())
    for example in training.examples:
        digest.update(example.tokens.tobytes())
        digest.update(str(example.loss_start).encode())
    digest.update(f"{len(training.steps)} {training.tokens}".encode())
    return digest.hexdigest()
