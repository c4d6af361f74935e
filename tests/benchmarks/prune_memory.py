"""Memory and time of pruning a model that is not held in memory, against the estimate that is printed before. Prints JSON.

    OMP_NUM_THREADS=2 python tests/benchmarks/prune_memory.py

A random Llama of the shape of Llama 3.1 8B, of two blocks, bfloat16 in several safetensors files, is pruned by a quarter as the
step `prune` does it, in a process of its own. Beside it a plain forward and backward pass of the whole model, all gradients, over
the same batches, in another process. `full` is the estimate for all blocks at the recipe's default calibration set.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finescope import storage
from finescope.config import ModelSection, PruneSection
from finescope.models.load import ModelReference, materialise
from finescope.models.source import resolve
from finescope.pruning.cost import prune_cost
from finescope.stages.calibration import BATCH_TOKENS
from finescope.stages.prune import PruneJob, prune_calibrated
from finescope.stages.references import PROCESS_BYTES

_FULL_DEPTH = 32


def config_of(arguments: argparse.Namespace, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.mlp,
        num_hidden_layers=layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        vocab_size=arguments.vocabulary,
        dtype="bfloat16",
    )


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the model and a tokenizer that nobody uses."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config_of(arguments, arguments.layers)).save_pretrained(arguments.folder / "model", max_shard_size="1GB")
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "<eos>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(arguments.folder / "model")
    return {"files": len(list((arguments.folder / "model").glob("*.safetensors")))}


def documents(arguments: argparse.Namespace) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    return tuple(
        random.integers(3, arguments.vocabulary, arguments.max_tokens).astype(np.int32) for _ in range(arguments.documents)
    )


def reference(arguments: argparse.Namespace) -> ModelReference:
    section = ModelSection.model_validate({"path": str(arguments.folder / "model"), "dtype": "bfloat16"})
    return materialise(resolve(section, "model.path"), section, str(arguments.folder / "unused"))


def estimate(arguments: argparse.Namespace, layers: int, tokens: int) -> dict[str, Any]:
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(arguments, layers))
    cost = prune_cost(model, section_of(arguments), 2, tokens, arguments.max_tokens, BATCH_TOKENS)
    return asdict(cost) | {
        "tokens": tokens,
        "memory_bytes": PROCESS_BYTES + cost.memory_bytes,
        "passes": cost.passes,
        "spills": cost.spills,
    }


def section_of(arguments: argparse.Namespace) -> PruneSection:
    return PruneSection(ratio=arguments.ratio)


def prune(arguments: argparse.Namespace) -> dict[str, Any]:
    spills = estimate(arguments, arguments.layers, arguments.documents * arguments.max_tokens)["spills"]
    uri = storage.join(str(arguments.folder), "student")
    model = reference(arguments)
    job = PruneJob(model, "random", model, section_of(arguments), documents(arguments), (), uri, spills)
    began = time.perf_counter()
    _, facts = prune_calibrated(job, lambda _: None)
    kept = ("ratio_reached", "query_heads_after", "kv_heads_after", "mlp_channels_after", "reload", "peak", "seconds")
    return {name: facts[name] for name in kept} | {"all_seconds": time.perf_counter() - began}


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """A forward and backward pass over the same batches, gradients of all weights."""
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "model", dtype="auto")
    ids = torch.from_numpy(np.stack(documents(arguments)).astype(np.int64))
    began = time.perf_counter()
    for batch in ids.split(max(1, BATCH_TOKENS // arguments.max_tokens)):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


_PARTS = {"build": build, "prune": prune, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where the model is written; a temporary one if not given")
    parser.add_argument("--part", choices=_PARTS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(_PARTS[arguments.part](arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found: dict[str, Any] = {}
        for part in _PARTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--part", part]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[part] = json.loads(output.splitlines()[-1])
    tokens = arguments.documents * arguments.max_tokens
    found["estimate"] = estimate(arguments, arguments.layers, tokens)
    found["passes"] = {name: seconds / found["plain"]["seconds"] for name, seconds in found["prune"]["seconds"].items()}
    defaults = PruneSection()
    found["full"] = estimate(arguments, _FULL_DEPTH, defaults.documents * defaults.max_tokens)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), **found}, indent=2))


if __name__ == "__main__":
    main()
