"""What pruning methods keep of a domain and of general text, without any training. Prints a line of JSON a row.

    OMP_NUM_THREADS=1 python tests/benchmarks/pruning_quality.py --corpus '../shared/data/corpus/*.parquet' --domain math

SmolLM2-135M. Every row removes the same share of the block parameters, chosen on the same calibration documents and tokens, drawn
at random (seed 0) from the rows of the domain or of `general`; perplexity is over held-out documents of both, the same for all.
`to_default`: mean difference of a document's negative log-likelihood a token from the default's on the domain, and its 95 %
interval by 2,000 bootstrap samples of documents. Torch-Pruning's group Taylor importance has a row where it is installed.
"""

import argparse
import copy
import glob
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from activations import reference
from transformers import PreTrainedModel

from finescope.config import PruneSection
from finescope.corpus.tokenise import CPU_BATCH_TOKENS, length_batches, pad_batch, tokenise
from finescope.evaluation.perplexity import Perplexity, perplexity_of_documents
from finescope.models.anatomy import anatomy_of, block_parameters
from finescope.models.blocks import BlocksInMemory
from finescope.models.load import load_model, load_tokenizer
from finescope.pruning.measured import Clock
from finescope.pruning.prune import Places, prune_model
from finescope.pruning.stream import Batch

MLP = {"structure": ("mlp",), "round_to": 32}
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "random": {**MLP, "method": "random", "compensate": False},
    "magnitude": {**MLP, "method": "magnitude", "compensate": False},
    "activation": {**MLP, "method": "activation", "compensate": False},
    "wifv": {**MLP, "method": "wifv", "compensate": False},
    "taylor": {**MLP, "compensate": False},
    "taylor_second": {**MLP, "method": "taylor_second", "compensate": False},
    "wifv_compensated": {**MLP, "method": "wifv"},
    "activation_compensated": {**MLP, "method": "activation"},
}
READ_NOTHING = ("random", "magnitude")


class Sets(NamedTuple):
    """Token ids, int32 [T] a document."""

    calibration: dict[str, list[np.ndarray]]
    held_out: dict[str, list[np.ndarray]]


def read_sets(arguments: argparse.Namespace, tokenizer: Any) -> Sets:
    """Calibration and held-out documents of the domain and of `general`."""
    rows: dict[str, list[str]] = {arguments.domain: [], "general": []}
    for file in sorted(glob.glob(arguments.corpus)):
        for row in pq.read_table(file, columns=["instruction", "input", "output", "domain"]).to_pylist():
            if row["domain"] in rows:
                rows[row["domain"]].append("\n".join(row[name] for name in ("instruction", "input", "output")))
    sets = Sets({}, {})
    for domain, texts in rows.items():
        order = np.random.default_rng(0).permutation(len(texts))
        tokens = tokenise(tokenizer, [texts[i] for i in order[: arguments.documents + arguments.held_out]], arguments.tokens)
        sets.held_out[domain], sets.calibration[domain] = tokens[: arguments.held_out], tokens[arguments.held_out :]
    return sets


def batches_of(documents: list[np.ndarray], pad: int) -> list[Batch]:
    batches = []
    for batch in length_batches([len(tokens) for tokens in documents], CPU_BATCH_TOKENS):
        ids, mask = pad_batch([documents[index] for index in batch], pad)
        batches.append((torch.from_numpy(ids), torch.from_numpy(mask)))
    return batches


def torch_pruning(model: PreTrainedModel, ratio: float, batches: Iterable[Batch]) -> PreTrainedModel:
    """Torch-Pruning's GroupTaylorImportance on MLP channels, as uniform as ours, in multiples of 32."""
    import torch_pruning as tp

    student: Any = copy.deepcopy(model).requires_grad_(True)
    for ids, mask in batches:
        student(input_ids=ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100), use_cache=False).loss.backward()
    blocks = student.model.layers
    expand = {module for block in blocks for module in (block.mlp.gate_proj, block.mlp.up_proj)}
    channels = blocks[0].mlp.gate_proj.out_features
    share = ratio * sum(p.numel() for p in blocks.parameters()) / (len(blocks) * 3 * blocks[0].mlp.gate_proj.weight.numel())
    student.config.use_cache = False
    pruner = tp.pruner.BasePruner(
        student,
        example_inputs=torch.arange(1, 9)[None],
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=round(share * channels / 32) * 32 / channels,
        ignored_layers=[part for part in student.modules() if isinstance(part, torch.nn.Linear) and part not in expand],
    )
    pruner.step()
    student.zero_grad()
    return student.eval()


def pruned(model: PreTrainedModel, section: PruneSection, batches: list[Batch]) -> tuple[PreTrainedModel, dict[str, Any]]:
    clock = Clock()
    result = prune_model(BlocksInMemory(model, anatomy_of(model)), section, batches, Places(None, None), clock, lambda _: None)
    kept = {name: value for name, value in result.summary.items() if name.endswith("_after")}
    return result.student, {"kept": kept, "seconds": clock.seconds}


def interval(one: Perplexity, other: Perplexity) -> list[float]:
    """Mean and 95 % interval of the difference of a document's mean negative log-likelihood, paired by document."""
    differences = one.nll / one.tokens - other.nll / other.tokens
    drawn = np.random.default_rng(0).integers(len(differences), size=(2000, len(differences)))
    return [float(value) for value in (differences.mean(), *np.quantile(differences[drawn].mean(axis=1), (0.025, 0.975)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--domain", default="math")
    parser.add_argument("--documents", type=int, default=256, help="of calibration")
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128, help="of a document")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.35])
    parser.add_argument("--rows", nargs="+", default=[*ROWS, "torch_pruning"])
    parser.add_argument("--calibration", nargs="+", default=["domain", "general"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = reference(folder)
        model, tokenizer = load_model(where), load_tokenizer(where)
    sets = read_sets(arguments, tokenizer)

    def measure(student: PreTrainedModel) -> dict[str, Perplexity]:
        documents = sets.held_out.items()
        return {
            name: perplexity_of_documents(student, held, CPU_BATCH_TOKENS, tokenizer.pad_token_id, lambda _: None)
            for name, held in documents
        }

    print(json.dumps({"dense": {name: found.value for name, found in measure(model).items()}}), flush=True)
    for ratio in arguments.ratios:
        defaults: dict[str, Perplexity] = {}
        for calibration in arguments.calibration:
            on = arguments.domain if calibration == "domain" else "general"
            batches = batches_of(sets.calibration[on], tokenizer.pad_token_id)
            for row in arguments.rows:
                if row in READ_NOTHING and calibration != arguments.calibration[0]:
                    continue
                if row == "torch_pruning" and importlib.util.find_spec(row) is None:
                    continue
                report(row, calibration, ratio, arguments.domain, model, batches, measure, defaults)


def report(
    row: str,
    calibration: str,
    ratio: float,
    domain: str,
    model: PreTrainedModel,
    batches: list[Batch],
    measure: Callable[[PreTrainedModel], dict[str, Perplexity]],
    defaults: dict[str, Perplexity],
) -> None:
    """Prune, measure, print; the first default on the domain is what the others are compared with."""
    began = time.monotonic()
    if row == "torch_pruning":
        student, facts = torch_pruning(model, ratio, batches), {}
    else:
        student, facts = pruned(model, PruneSection.model_validate({"ratio": ratio, **ROWS[row]}), batches)
    seconds = time.monotonic() - began
    removed = 1 - block_parameters(student, anatomy_of(model)) / block_parameters(model, anatomy_of(model))
    found = measure(student)
    if row == "default":
        defaults.setdefault("default", found[domain])
    line = {
        "row": row,
        "calibration": calibration,
        "ratio": ratio,
        "removed": removed,
        "perplexity": {name: value.value for name, value in found.items()},
        "to_default": interval(found[domain], defaults["default"]) if defaults else None,
        "seconds": seconds,
        **facts,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
