"""A training on a GPU: bf16 passes over fp32 weights that come near the CPU's, with and without what saves memory."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from distillation_fixtures import distill_section, random_examples, student_directory, tiny_llama
from distillation_runs import shards_at, table_of

from finescope.distillation.engine import PlainEngine
from finescope.distillation.job import TrainJob
from finescope.distillation.loop import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def losses(job: TrainJob, root: Path, **changes: object) -> list[float]:
    """The loss of each step of a training in `root`."""
    job = replace(job, checkpoints=str(root / "checkpoints"), output=str(root / "out"), **changes)
    train(job, PlainEngine, lambda *_: None)
    lines = (root / "out" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_steps_of_the_gpu_are_near_those_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    examples = random_examples(48)
    shards = shards_at(tmp_path, table_of(examples, tiny_llama(seed=3)))
    section = distill_section(method=method, kl_weight=0.5, epochs=3, batch_size=8, learning_rate=1e-3)
    student = student_directory(tmp_path / "student")
    job = TrainJob(student, examples, section, "", "", teacher=shards)
    found = {
        "packed": losses(job, tmp_path / "packed"),
        "kept": losses(job, tmp_path / "kept", recompute=False),
        "padded": losses(job, tmp_path / "padded", section=section.model_copy(update={"packing": False})),
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = losses(job, tmp_path / "cpu")
    assert len(on_cpu) == 18
    for name, values in found.items():
        assert values == pytest.approx(on_cpu, rel=0.03), name


def test_logits_never_exist_whole(tmp_path: Path) -> None:
    """Memory of the head's loss is that of a chunk, whatever the number of positions."""
    from finescope.distillation.losses import CHUNK_LOGITS, Mixture, head_loss

    peaks = []
    weight = torch.randn(128_000, 256, device="cuda", dtype=torch.bfloat16)
    for positions in (2_000, 16_000):
        hidden = torch.randn(positions, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(0, 128_000, (positions,), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = head_loss(hidden, weight, targets, CHUNK_LOGITS // 128_000, None, Mixture(0.0), None).total
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - 6 * hidden.numel())
    assert max(peaks) < 6 * 4 * CHUNK_LOGITS
    assert peaks[1] < 1.5 * peaks[0] + 64 * 2**20
