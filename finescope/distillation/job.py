"""A training as data: what it is made of, and what it amounts to before it runs."""

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np

from finescope import storage
from finescope.config import DistillSection
from finescope.distillation.batches import Step, plan_steps, split_held_out
from finescope.distillation.examples import Example, from_table
from finescope.errors import StepFailed


@dataclass(frozen=True)
class TrainJob:
    """One training of one student, wherever it runs. Pickles small when the examples are on storage."""

    student: str  # directory of a stock Hugging Face model with its tokenizer: local path or URI
    examples: str | tuple[Example, ...]  # URI of a Parquet file of `examples.SCHEMA`, or the examples themselves
    section: DistillSection
    checkpoints: str  # URI of a directory of this job's own
    output: str  # URI; gets model/, metrics/ and, with LoRA, adapter/
    cap_tokens: int | None = None  # end after exactly so many tokens (padding not counted) instead of after `epochs`
    teacher: tuple[str, ...] = ()  # URIs of shards of `schemas.TEACHER_LOGPROBS`, needed where `section.kl_weight` is not 0
    # Gradient checkpointing, which changes memory and time and no result; None: where there is a GPU.
    recompute: bool | None = None
    track: tuple[str, ...] = ()  # names of `tracking`: where metrics go beside `output`

    @property
    def record(self) -> str:
        """URI of the JSON that says how the training went; it is there if and only if the result is."""
        return storage.join(self.output, "trained.json")


@dataclass(frozen=True)
class Training:
    """What a job amounts to before it runs."""

    examples: tuple[Example, ...]
    steps: list[Step] = field(repr=False)
    held_out: np.ndarray  # int64, indices of the examples that are not trained on

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
    chosen, held_out = split_held_out(len(examples), section.held_out, section.seed)
    steps = plan_steps(examples, chosen, section.batch_size, section.epochs, section.seed, job.cap_tokens)
    if not steps:
        raise StepFailed("distillation has no example to train on")
    return Training(examples, steps, held_out)


def fingerprint(job: TrainJob, training: Training) -> str:
    """What a checkpoint must share with the job that goes on from it.

    Not the ZeRO stage, nor where the engine keeps things: checkpoints are whole, and a training may go on with others.
    """
    values = job.section.model_dump_json(exclude={"zero_stage", "offload"})
    digest = hashlib.sha256(values.encode())
    for example in training.examples:
        digest.update(example.tokens.tobytes())
        digest.update(str(example.loss_start).encode())
    digest.update(f"{len(training.steps)} {training.tokens}".encode())
    return digest.hexdigest()


def learning_rate(step: int, steps: int, peak: float, warmup_share: float) -> float:
    """Of step 0..steps-1: a linear rise over the first `warmup_share`, then a cosine that would be 0 at `steps`."""
    warmup = math.ceil(warmup_share * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
