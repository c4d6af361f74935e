"""Training under ZeRO 1, 2 and 3 by two CPU workers against one worker without it: losses, memory, seconds. Prints JSON.

    python tests/benchmarks/zero.py

A Llama of random weights, some 20 M parameters, is trained whole for --steps steps on the same examples. Of each worker: what is
resident before there is a model, the most up to the last step but one, and what is then held. After that the student is written,
for which rank 0 gathers all weights and moments.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import ray.cloudpickle
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from distillation_fixtures import distill_section, tiny_tokenizer

from finescope import storage
from finescope.distillation.engine import Engine, EngineFactory, OptimizerSettings
from finescope.distillation.examples import Example
from finescope.distillation.loop import TrainJob, train
from finescope.models.memory import peak_memory
from finescope.runners import ray_train
from finescope.runners.base import Resources, TrainProgress

BATCH, SHORTEST, LONGEST, VOCABULARY = 8, 48, 96, 16_384


def write_student(directory: Path) -> int:
    """A stock directory; returns the number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model.num_parameters()


def examples(steps: int) -> tuple[Example, ...]:
    """One epoch of random tokens."""
    random = np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST, steps * BATCH)
    return tuple(Example(random.integers(3, VOCABULARY, length).astype(np.int32), 1) for length in lengths)


class _Measured:
    """An engine that notes the time and the memory of its process after each step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.after: list[dict[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *batch: Any) -> Any:
        return self._engine(*batch)

    def step(self, learning_rate: float) -> float:
        norm = self._engine.step(learning_rate)
        resident, peak = psutil.Process().memory_info().rss, peak_memory(torch.device("cpu"))["memory_bytes"]
        self.after.append({"time": time.monotonic(), "resident": resident, "peak": peak})
        return norm


def measured(job: TrainJob, notes: str, factory: EngineFactory, progress: TrainProgress) -> None:
    """The loop; each process leaves what it took in a file of `notes`."""
    before, engines = psutil.Process().memory_info().rss, []

    def make(module: torch.nn.Module, settings: OptimizerSettings) -> Engine:
        engines.append(_Measured(factory(module, settings)))
        return engines[0]

    train(job, make, progress)
    after = engines[0].after
    taken = {"before": before, "peak": after[-2]["peak"], "held": after[-2]["resident"]}
    megabytes = {name: round(value / 1e6) for name, value in taken.items()}
    seconds = round((after[-1]["time"] - after[0]["time"]) / (len(after) - 1), 3)
    storage.put_json(storage.join(notes, f"rank-{engines[0].rank}.json"), {"megabytes": megabytes, "seconds_a_step": seconds})


def trained(root: Path, student: str, steps: int, workers: int, stage: int) -> dict[str, Any]:
    """One training: its losses, and what each worker took."""
    home = root / f"zero-{stage}"
    section = distill_section(
        method="full", learning_rate=1e-3, batch_size=BATCH, micro_batch_tokens=4 * LONGEST, max_tokens=LONGEST, epochs=1
    )
    section = section.model_copy(update={"checkpoint_steps": steps})
    job = TrainJob(student, examples(steps), section, str(home / "checkpoints"), str(home / "out"))
    began = time.monotonic()
    ray_train.train(measured, (job, str(home)), lambda amount, note="": None, Resources(), workers, {"CPU": 1.0}, stage)
    rows = storage.read_parquet(str(home / "out" / "metrics" / "part-00000.parquet")).to_pylist()
    return {
        "zero_stage": stage,
        "workers": [storage.read_json(str(home / f"rank-{rank}.json")) for rank in range(workers)],
        "seconds_in_all": round(time.monotonic() - began, 1),
        "losses": [row["value"] for row in rows if row["name"] == "loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory(prefix="fz", dir="/tmp") as directory:
        root = Path(directory)
        parameters = write_student(root / "student")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(root / "ray"))
        runs = [trained(root, str(root / "student"), steps, 2 if stage else 1, stage) for stage in (0, 1, 2, 3)]
        ray.shutdown()
    alone = runs[0]["losses"]
    for run in runs:
        losses = run.pop("losses")
        assert len(losses) == len(alone) == steps
        run["largest_difference_of_a_loss"] = max(abs(one - other) for one, other in zip(losses, alone, strict=True))
    result = {"parameters": parameters, "steps": steps, "first_loss": alone[0], "last_loss": alone[-1], "runs": runs}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
