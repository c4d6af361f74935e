"""The training loop: one code for every engine, killed and resumed with the same result."""

import contextlib
import datetime
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from finescope import directories, schemas, storage
from finescope.distillation import checkpoint
from finescope.distillation.batches import Pass, Step, collate, loss_tokens, passes_of, whole
from finescope.distillation.checkpoint import Cursor
from finescope.distillation.engine import Engine, EngineFactory, Inputs, OptimizerSettings
from finescope.distillation.job import Training, TrainJob, fingerprint, learning_rate, plan
from finescope.distillation.losses import Mixture
from finescope.distillation.stored import StoredTeacher
from finescope.distillation.student import load_student, save_student
from finescope.distillation.watching import watched
from finescope.errors import StepFailed
from finescope.models.memory import peak_memory

# Skipping a step now and then is harmless; this many in a row mean that the weights or the rate are bad.
MAX_SKIPPED_IN_A_ROW = 5
# How often the weights may then go back to the newest checkpoint, with half the rate from there on; the batches that were skipped
# stay behind.
MAX_ROLLBACKS = 2


@dataclass(frozen=True)
class _Run:
    """What all steps of a training share."""

    job: TrainJob
    training: Training
    identity: str
    student: Path
    teacher: StoredTeacher | None

    def batches(self, engine: Engine, step: Step) -> Iterator[tuple[Inputs, int]]:
        """This process's forward passes of a step, and how many tokens each has, padding counted."""
        section = self.job.section
        for rows in passes_of(step, engine.rank, engine.world_size, section.micro_batch_tokens, section.packing):
            yield self._inputs(engine.device, step, rows)

    def _inputs(self, device: torch.device, step: Step, rows: Pass) -> tuple[Inputs, int]:
        batch = collate(self.training.examples, step, rows)
        told = self.teacher.of_pass(self.training.examples, step, rows) if self.teacher else (None, None)
        arrays = (batch.tokens, batch.targets, batch.positions, *told)
        tokens, targets, *others = (None if array is None else torch.from_numpy(array).to(device) for array in arrays)
        assert tokens is not None
        assert targets is not None
        positions, ids, logprobs = others
        return (tokens, targets, positions, ids, logprobs), batch.tokens.size


def train(job: TrainJob, engine_factory: EngineFactory, progress: Callable[[int, str], Any]) -> None:
    """Train, checkpoint, merge and write `output`; after a crash the same call goes on from the newest checkpoint.

    All processes of the group call it. `progress` is told of steps on rank 0, and how the training stands; those of an earlier
    attempt come first.

    Raises:
        StepFailed: nothing to train on, or losses or gradients that stay non-finite.
        ResourceError: a tracker that `job.track` names is not installed or refuses.
    """
    with _prepared(job) as run:
        engine, cursor = _start(run, engine_factory)
        with watched(job, run.identity, progress if engine.rank == 0 else None) as watch:
            watch.steps(cursor)
            steps = len(run.training.steps)
            while cursor.step < steps and not _ended(job, cursor):
                cursor = _step(engine, run, cursor)
                if cursor.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                    cursor = _gone_back(run, cursor)
                    # Before another is made: two of them may not fit.
                    del engine
                    gc.collect()
                    engine, _ = _start(run, engine_factory)
                    checkpoint.save(engine, job.checkpoints, cursor)
                elif cursor.step % job.section.checkpoint_steps == 0 or cursor.step == steps:
                    cursor = _measured(engine, run, cursor)
                    checkpoint.save(engine, job.checkpoints, cursor)
                    watch.checkpoint(cursor)
                watch.steps(cursor)
            watch.ended(steps)
            _write(engine, run, cursor)


@contextlib.contextmanager
def _prepared(job: TrainJob) -> Iterator[_Run]:
    training = plan(job)
    with directories.local_directory(job.student) as student, directories.temporary_directory(job.output) as scratch:
        teacher = StoredTeacher(job.teacher, training.examples, scratch) if job.section.kl_weight else None
        yield _Run(job, training, fingerprint(job, training), Path(student), teacher)


def _start(run: _Run, engine_factory: EngineFactory) -> tuple[Engine, Cursor]:
    """An engine at the newest checkpoint, or at the beginning."""
    job, section = run.job, run.job.section
    torch.manual_seed(section.seed)
    recompute = torch.cuda.is_available() if job.recompute is None else job.recompute
    mixture = Mixture(section.kl_weight, section.kl_divergence, section.kl_temperature)
    student = load_student(run.student, section.method, section.rank, section.seed, mixture, recompute)
    engine = engine_factory(student, OptimizerSettings(section.weight_decay, section.max_grad_norm, section.offload))
    if engine.rank == 0:
        directories.delete_temporaries(job.checkpoints)
    return engine, checkpoint.load_newest(engine, job.checkpoints, run.identity) or Cursor(run.identity)


def _ended(job: TrainJob, cursor: Cursor) -> bool:
    return job.section.patience is not None and cursor.without_gain >= job.section.patience


def _step(engine: Engine, run: _Run, cursor: Cursor) -> Cursor:
    """One optimiser step. The gradient is that of the mean loss over the targets of the whole batch, all processes'."""
    began, step, section = time.monotonic(), run.training.steps[cursor.step], run.job.section
    # Seeded here and not once: what a step draws then depends on neither kills nor on the steps before it.
    torch.manual_seed(int(np.random.SeedSequence([section.seed, cursor.step, engine.rank]).generate_state(1)[0]))
    targets_in_all = loss_tokens(run.training.examples, step)
    sums, padded = torch.zeros(3, dtype=torch.float64, device=engine.device), 0
    batches = list(run.batches(engine, step))
    for number, (inputs, size) in enumerate(batches, start=1):
        found = engine(*inputs)
        engine.backward(found[0] / targets_in_all, last=number == len(batches))
        sums += torch.stack([value.detach() for value in found])
        padded += size
    rate = learning_rate(cursor.step, len(run.training.steps), section.learning_rate, section.warmup_share)
    rate *= 0.5**cursor.rollbacks
    norm = engine.step(rate)
    *sums_in_all, padded_in_all = engine.sum([*sums.tolist(), float(padded)])
    loss, cross_entropy, divergence = (value / targets_in_all for value in sums_in_all)
    skipped = not math.isfinite(norm)
    row = {
        "loss": loss,
        **({"cross_entropy": cross_entropy, "divergence": divergence} if section.kl_weight else {}),
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens_per_second": step.tokens / (time.monotonic() - began),
        "padding_share": 1.0 - step.tokens / padded_in_all,
        "skipped": float(skipped),
        **{name: float(value) for name, value in peak_memory(engine.device).items()},
        "time": time.time(),
    }
    return replace(
        cursor,
        step=cursor.step + 1,
        skipped=cursor.skipped + skipped,
        skipped_in_a_row=cursor.skipped_in_a_row + 1 if skipped else 0,
        tokens=cursor.tokens + step.tokens,
        metrics=(*cursor.metrics, row),
    )


def _gone_back(run: _Run, cursor: Cursor) -> Cursor:
    """Where a training stands whose weights are those of the newest checkpoint and whose data goes on.

    Raises:
        StepFailed: it has been there too often.
    """
    last = cursor.metrics[-1]
    if cursor.rollbacks == MAX_ROLLBACKS:
        raise StepFailed(
            f"{cursor.skipped_in_a_row} training steps in a row had a loss or gradient that is not finite (loss {last['loss']}, "
            f"gradient norm {last['grad_norm']}, step {cursor.step} of {len(run.training.steps)}), {MAX_ROLLBACKS} times after "
            "going back to a checkpoint with half the learning rate; a lower learning_rate may help"
        )
    return replace(cursor, rollbacks=cursor.rollbacks + 1, skipped_in_a_row=0)


def _measured(engine: Engine, run: _Run, cursor: Cursor) -> Cursor:
    """The cursor with the loss on the held-out examples, if there are any."""
    if not len(run.training.held_out):
        return cursor
    step = whole(run.training.examples, run.training.held_out)
    total = 0.0
    with torch.no_grad():
        for inputs, _ in run.batches(engine, step):
            total += float(engine(*inputs)[0])
    loss = engine.sum([total])[0] / loss_tokens(run.training.examples, step)
    row = {**cursor.metrics[-1], "held_out_loss": loss}
    cursor = replace(cursor, metrics=(*cursor.metrics[:-1], row))
    # Written so that a loss that is not a number is no gain.
    if cursor.best_loss is None or loss < cursor.best_loss:
        return replace(cursor, best_step=cursor.step, best_loss=loss, without_gain=0)
    return replace(cursor, without_gain=cursor.without_gain + 1)


def metrics_table(rows: Sequence[dict[str, float]]) -> pa.Table:
    """The history as `schemas.METRICS`: the values of a step stand together, steps in order."""
    long = [(name, row[name], row["time"]) for row in rows for name in row if name != "time"]
    names, values, seconds = zip(*long, strict=True) if long else ((), (), ())
    times = [datetime.datetime.fromtimestamp(second, tz=datetime.UTC) for second in seconds]
    table = pa.table({"step": ["distill"] * len(long), "name": names, "value": values, "time": times})
    return schemas.conform(table, schemas.METRICS)


def _write(engine: Engine, run: _Run, cursor: Cursor) -> None:
    # Collective, as sharded engines gather the weights; only rank 0 has something to write.
    job, weights = run.job, engine.trainable()
    if engine.rank == 0:
        best = job.section.patience is not None and cursor.best_step is not None
        record = {
            "training_tokens": cursor.tokens,
            "training_steps": cursor.step,
            "skipped_steps": cursor.skipped,
            "rollbacks": cursor.rollbacks,
            "result_step": cursor.best_step if best else cursor.step,
            "held_out_loss": next((row["held_out_loss"] for row in cursor.metrics[::-1] if "held_out_loss" in row), None),
            "best_held_out_loss": cursor.best_loss,
        }
        storage.put_parquet(storage.join(job.output, "metrics", "part-00000.parquet"), metrics_table(cursor.metrics))
        with directories.scratch_directory(storage.join(job.output, "model")) as scratch:
            # The last weights, or with `patience` those of the lowest loss on the held-out examples.
            chosen = checkpoint.weights_of(job.checkpoints, record["result_step"]) if best else weights
            save_student(run.student, chosen, job.section.method, job.section.rank, job.student, scratch)
            for name in ("adapter", "model"):
                if (scratch / name).is_dir():
                    directories.put_tree(scratch / name, storage.join(job.output, name))
        storage.put_json(job.record, record)
    engine.sum([0.0])  # a barrier: no process ends before the result is there
