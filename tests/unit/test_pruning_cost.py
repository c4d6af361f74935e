import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finescope.config import PruneSection
from finescope.models.load import ModelReference
from finescope.pruning.cost import HELD_BYTES, prune_cost
from finescope.pruning.measured import Clock

# Of Llama 3.1 8B; a block has 218,112,000 parameters.
_EIGHT = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def cost(tokens, **section):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**_EIGHT))
    return prune_cost(model, PruneSection.model_validate({"ratio": 0.25, **section}), 2, tokens, 256, 1024)


def test_operations_by_hand():
    tokens, block, head = 1000, 218_112_000 * 32, 4096 * 128256
    found = cost(tokens, compensate=False)
    assert found.pass_flops == 6 * tokens * (block + head)
    assert found.flops == found.importance_flops == tokens * (8 * block + 4 * head)
    assert found.passes == pytest.approx((8 * block + 4 * head) / (6 * (block + head)))
    assert cost(tokens, compensate=False, method="random").flops == 0


def test_hidden_states_go_to_disk_beyond_a_bound():
    # A token takes 4096 x 2 bytes at each of 32 boundaries.
    most = HELD_BYTES // (4096 * 2 * 32)
    assert not cost(most).spills
    found = cost(most + 1)
    assert found.scratch_bytes == (most + 1) * 4096 * 2 * 32
    assert found.importance_bytes < cost(most).importance_bytes
    assert not cost(most + 1, method="magnitude").spills


def test_memory_is_that_of_a_block_and_not_of_the_model():
    found = cost(65536)
    embeddings, whole = 2 * 2 * 4096 * 128256, 2 * (218_112_000 * 32 + 2 * 4096 * 128256)
    assert embeddings < found.importance_bytes < whole / 3
    # Second moments of the 10,752 channels kept, damped and factorised: 2.8 GB.
    assert 3 * 8 * 10752**2 < found.student_bytes < 0.75 * whole


_PRUNE = """
import json, resource, sys
import torch
from pathlib import Path
from finescope.config import PruneSection
from finescope.models.blocks import open_blocks
from finescope.models.load import ModelReference
from finescope.pruning.cost import prune_cost
from finescope.pruning.measured import Clock, peak_memory
from finescope.pruning.prune import Places, prune_model

torch.set_num_threads(1)
(torch.ones(300, 300) @ torch.ones(300, 300)).sum()
before = peak_memory(torch.device("cpu"))["memory_bytes"]
reference, scratch = ModelReference.model_validate_json(sys.argv[1]), Path(sys.argv[2])
section = PruneSection(ratio=0.25, round_to=8)
generator = torch.Generator().manual_seed(0)
batches = [(torch.randint(512, (4, 256), generator=generator), torch.ones(4, 256, dtype=torch.int64)) for _ in range(6)]
with open_blocks(reference, "cpu") as source:
    prune_model(source, section, batches, Places(None, scratch / "student"), Clock(), lambda _: None)
    cost = prune_cost(source.model, section, 4, 6 * 1024, 256, 1024)
print(json.dumps({"growth": peak_memory(torch.device("cpu"))["memory_bytes"] - before, "estimate": cost.memory_bytes}))
"""


@pytest.mark.slow
def test_the_estimate_holds(tmp_path: Path):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=512))
    model.save_pretrained(tmp_path / "model")
    reference = ModelReference(
        path=str(tmp_path / "model"),
        revision=None,
        dtype="float32",
        trust_remote_code=False,
        allow_pickle=False,
        fingerprint="",
        model_type="llama",
        num_layers=8,
        d_model=256,
        vocab_size=512,
        num_parameters=model.num_parameters(),
        block_parameters=0,
    )
    command = [sys.executable, "-c", _PRUNE, reference.model_dump_json(), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, check=False, text=True)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert 50e6 < found["growth"] < found["estimate"] < 4 * found["growth"]


def test_a_part_inside_of_another_counts_once(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("finescope.pruning.measured.time.perf_counter", lambda: next(times))
    clock = Clock()
    with clock.part("outer"):
        with clock.part("inner"):
            pass
    with clock.part("inner"):
        pass
    assert clock.seconds == {"inner": 3.0, "outer": 8.0}
