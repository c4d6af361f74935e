"""Training steps against a bare PyTorch loop on the same batches, and against TRL's SFTTrainer on the same examples. Prints JSON.

    OMP_NUM_THREADS=1 python tests/benchmarks/train_speed.py

A random Llama of SmolLM2-135M's shape or fewer blocks, LoRA on all linear maps, fp32. In turns, each round the same steps:

* `ours`: finescope's loop (packing, chunked loss, clipping, metrics), timed from step to step where no checkpoint lies between;
* `bare`: forward, cross-entropy by torch on the logits, backward, clip, AdamW, on the very batches that `ours` packed;
* `trl`: SFTTrainer, where it is installed (extra `peers`), on the same examples: its own batches of a document a row, padded, as
  its packing mixes documents where there is no flash attention.

Tokens a second count tokens of examples, not padding; ratios are of medians over the rounds, by the clock and by CPU time.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finescope.config import DistillSection
from finescope.distillation.batches import IGNORED, collate, passes_of
from finescope.distillation.engine import OptimizerSettings, PlainEngine, adamw, trainable_parameters
from finescope.distillation.examples import Example
from finescope.distillation.job import TrainJob, learning_rate, plan
from finescope.distillation.loop import train
from finescope.distillation.losses import Mixture
from finescope.distillation.student import load_student

VOCABULARY = 49_152
# The first step warms up; a checkpoint follows the last.
LEFT_OUT = 1


class Marks:
    """The moments at which steps ended, by the clock and by CPU time."""

    def __init__(self) -> None:
        self._moments: list[tuple[float, float]] = []

    def __call__(self, _: int = 1, __: str = "") -> None:
        self._moments.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> list[float]:
        """From the end of the first step to the end of the last but one."""
        first, last = self._moments[LEFT_OUT - 1], self._moments[-1 - LEFT_OUT]
        return [after - before for before, after in zip(first, last, strict=True)]


def examples_of(count: int, most: int) -> tuple[Example, ...]:
    """Random tokens; lengths and prompts like those of instruction data (log-normal, median 130, cut at `most`)."""
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(np.log(130), 0.5, count).astype(int), 24, most)
    return tuple(
        Example(chance.integers(3, VOCABULARY, length).astype(np.int32), max(1, int(length * chance.uniform(0.2, 0.6))))
        for length in lengths
    )


def student_at(folder: str, blocks: int) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ours(job: TrainJob) -> list[float]:
    marks = Marks()
    train(job, PlainEngine, marks)
    return marks.seconds()


def bare(job: TrainJob) -> list[float]:
    """The same batches, logits whole, by torch alone."""
    section, training, marks = job.section, plan(job), Marks()
    student = load_student(Path(job.student), section.method, section.rank, section.seed, Mixture(0.0), recompute=False)
    weights = trainable_parameters(student)
    optimizer = adamw(weights.values(), OptimizerSettings(section.weight_decay, section.max_grad_norm))
    model: Any = student.causal
    for number, step in enumerate(training.steps):
        passes = [collate(training.examples, step, rows) for rows in passes_of(step, 0, 1, section.micro_batch_tokens, True)]
        count = sum(int((batch.targets != IGNORED).sum()) for batch in passes)
        for batch in passes:
            positions = None if batch.positions is None else torch.from_numpy(batch.positions)
            logits = model(input_ids=torch.from_numpy(batch.tokens), position_ids=positions, use_cache=False).logits
            targets = torch.from_numpy(batch.targets).flatten()
            (functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum") / count).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), section.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, len(training.steps), section.learning_rate, section.warmup_share)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks()
    return marks.seconds()


def trl(job: TrainJob, folder: str) -> list[float]:
    """SFTTrainer on as many steps of as many documents; losses of responses alone, no gradient checkpointing."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    section, training, marks = job.section, plan(job), Marks()

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks()

    order = [int(index) for step in training.steps for index in step.indices]
    rows = [training.examples[index] for index in order]
    data = Dataset.from_dict(
        {
            "input_ids": [row.tokens.tolist() for row in rows],
            "completion_mask": [[int(at >= row.loss_start) for at in range(len(row.tokens))] for row in rows],
        }
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    # Of the sizes that divide a step the one that ours has rows for, about.
    micro = max(size for size in (1, 2, 4, 8, 16) if section.batch_size % size == 0 and size * 256 <= section.micro_batch_tokens)
    config = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=section.batch_size // micro,
        max_steps=len(training.steps),
        learning_rate=section.learning_rate,
        max_length=section.max_tokens,
        packing=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=section.rank, lora_alpha=section.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = LlamaForCausalLM.from_pretrained(job.student)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[Callback()],
    )
    trainer.train()
    return marks.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4, help="of which the second to the last but one are timed")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    values = {"batch_size": arguments.batch_size, "micro_batch_tokens": 2048, "zero_stage": 0, "held_out": 0, "epochs": 1}
    section = DistillSection.model_validate({**values, "checkpoint_steps": 1000})
    examples = examples_of(arguments.steps * arguments.batch_size, section.max_tokens)
    taken: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        student = student_at(f"{folder}/student", arguments.blocks)
        jobs = [
            TrainJob(student, examples, section, f"{folder}/checkpoints-{number}", f"{folder}/out-{number}", recompute=False)
            for number in range(arguments.rounds)
        ]
        for number, job in enumerate(jobs):
            taken.setdefault("bare", []).append(bare(job))
            taken.setdefault("ours", []).append(ours(job))
            if importlib.util.find_spec("trl") is not None:
                taken.setdefault("trl", []).append(trl(job, f"{folder}/trl-{number}"))
        training = plan(jobs[0])
    timed = training.steps[LEFT_OUT:-LEFT_OUT]
    padded = sum(
        collate(training.examples, step, rows).tokens.size
        for step in timed
        for rows in passes_of(step, 0, 1, section.micro_batch_tokens, True)
    )
    tokens = sum(step.tokens for step in timed)
    medians = {name: [statistics.median(column) for column in zip(*rounds, strict=True)] for name, rounds in taken.items()}
    report = {
        "machine": {"processor": platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens_per_second": {name: tokens / clock for name, (clock, _) in medians.items()},
        "ours_to": {
            name: {"clock": clock / medians["ours"][0], "cpu": cpu / medians["ours"][1]}
            for name, (clock, cpu) in medians.items()
            if name != "ours"
        },
        "rounds": taken,
        "useful_tokens": tokens / padded,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
