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
from finescope.models.groups import layout_of
from finescope.models.load import load_model, load_tokenizer
from finescope.pruning.allocation import choose
from finescope.pruning.importance import Importance
from finescope.pruning.measured import Clock
from finescope.pruning.prune import importance_by_method
from finescope.pruning.stream import Batch
from finescope.pruning.student import build_student
from finescope.pruning.surgery import Surgery

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


class Pruner:
    """Prunes one model on one calibration set; what ratios and rows share is computed once."""

    def __init__(self, model: PreTrainedModel, batches: list[Batch]) -> None:
        self._model, self._batches = model, batches
        self._source = BlocksInMemory(model, anatomy_of(model))
        self._layout = layout_of(model, self._source.anatomy)
        self._importance: dict[str, Importance] = {}
        self._seconds: dict[str, float] = {}
        self._with_gradients: PreTrainedModel | None = None

    def ours(self, section: PruneSection) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The student, and what the parts took in seconds."""
        clock, began = Clock(), time.monotonic()
        if section.method not in self._importance:
            found = importance_by_method(self._source, self._layout, section, self._batches, None, lambda _: None)
            self._importance[section.method], self._seconds[section.method] = found, time.monotonic() - began
        importance = self._importance[section.method]
        kept = choose(importance, self._layout, section.ratio, section.within_blocks, section.round_to, required=True)
        surgery = Surgery(self._model, self._source.anatomy, self._layout, kept)
        with clock.part("student"):
            origins, fitted_on = tuple(range(self._layout.num_layers)), self._batches if section.compensate else ()
            build_student(self._source, origins, surgery, fitted_on, None, clock, lambda _: None)
        counts = [int(indices.shape[-1]) for indices in kept]
        return surgery.student, {"kept": counts, "seconds": {"importance": self._seconds[section.method], **clock.seconds}}

    def torch_pruning(self, ratio: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Torch-Pruning's GroupTaylorImportance on MLP channels, as uniform as ours, in multiples of 32."""
        import torch_pruning as tp  # pyright: ignore[reportMissingImports]

        if self._with_gradients is None:
            self._with_gradients = copy.deepcopy(self._model).requires_grad_(True)
            for ids, mask in self._batches:
                labels = torch.where(mask.bool(), ids, -100)
                self._with_gradients(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        student: Any = copy.deepcopy(self._with_gradients)
        student.config.use_cache = False  # it follows tensors through the output, and a cache is none
        for own, other in zip(student.parameters(), self._with_gradients.parameters(), strict=True):
            own.grad = other.grad
        blocks = student.model.layers
        expand = {module for block in blocks for module in (block.mlp.gate_proj, block.mlp.up_proj)}
        channels = blocks[0].mlp.gate_proj.out_features
        share = ratio * sum(p.numel() for p in blocks.parameters()) / (len(blocks) * 3 * blocks[0].mlp.gate_proj.weight.numel())
        pruner = tp.pruner.BasePruner(
            student,
            example_inputs=torch.arange(1, 9)[None],
            importance=tp.importance.GroupTaylorImportance(),
            pruning_ratio=round(share * channels / 32) * 32 / channels,
            ignored_layers=[part for part in student.modules() if isinstance(part, torch.nn.Linear) and part not in expand],
        )
        pruner.step()
        return student.eval(), {"kept": [blocks[0].mlp.gate_proj.out_features]}


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
    defaults: dict[float, Perplexity] = {}
    for calibration in arguments.calibration:
        on = arguments.domain if calibration == "domain" else "general"
        pruner = Pruner(model, batches_of(sets.calibration[on], tokenizer.pad_token_id))
        for row in arguments.rows:
            if row in READ_NOTHING and calibration != arguments.calibration[0]:
                continue
            if row == "torch_pruning" and importlib.util.find_spec(row) is None:
                continue
            for ratio in arguments.ratios:
                section = PruneSection.model_validate({"ratio": ratio, **ROWS.get(row, {})})
                student, facts = pruner.torch_pruning(ratio) if row == "torch_pruning" else pruner.ours(section)
                found = measure(student)
                if row == "default":
                    defaults.setdefault(ratio, found[arguments.domain])
                line = {
                    "row": row,
                    "calibration": calibration,
                    "ratio": ratio,
                    "removed": 1 - block_parameters(student, anatomy_of(student)) / block_parameters(model, anatomy_of(model)),
                    "perplexity": {name: value.value for name, value in found.items()},
                    "to_default": interval(found[arguments.domain], defaults[ratio]) if ratio in defaults else None,
                    **facts,
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
