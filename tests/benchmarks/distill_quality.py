"""What training gives back to a pruned model, by what it is trained on. Prints a line of JSON an arm.

    OMP_NUM_THREADS=1 python tests/benchmarks/distill_quality.py --data ../shared/data --work WORK --arms none random

SmolLM2-135M without a fifth of its block parameters (`prune`'s default, calibrated on the domain). Every arm trains the same
student on the same number of tokens with the same settings; arms differ in their documents (of the domain, of the whole corpus,
of a general set), in who wrote the responses, in the loss and in which weights are trained. Documents of the domain are drawn by
the corpus's label. Measured on documents and questions that no arm has seen: perplexity of whole texts, and of the answers given
the question by the chat template. What is dear (student, rewrites, log-probabilities) is kept in WORK, and done once.
"""

import argparse
import glob
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from activations import reference
from transformers import PreTrainedModel

from finescope import storage
from finescope.config import DistillSection, PruneSection
from finescope.corpus.tokenise import CPU_BATCH_TOKENS, length_batches, pad_batch, tokenise
from finescope.distillation.batches import Step, collate, loss_tokens, passes_of, whole
from finescope.distillation.engine import OptimizerSettings, PlainEngine
from finescope.distillation.examples import Example, build_examples
from finescope.distillation.job import TrainJob, plan
from finescope.distillation.loop import train
from finescope.distillation.losses import Mixture
from finescope.distillation.rewrite import select_first
from finescope.distillation.signal import TeacherScorer
from finescope.distillation.student import load_student
from finescope.distillation.teachers import rewriter_of
from finescope.evaluation.perplexity import perplexity_of_documents
from finescope.models.anatomy import anatomy_of
from finescope.models.blocks import BlocksInMemory
from finescope.models.load import ModelReference, load_model, load_tokenizer, reference_of
from finescope.pruning.measured import Clock
from finescope.pruning.prune import Places, prune_model

Pair = tuple[str, str]
# Documents, responses, and what of the section differs.
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "none": ("", "", {}),
    "random": ("random", "original", {}),
    "general": ("general", "original", {}),
    "curated": ("domain", "original", {}),
    "rewritten": ("domain", "rewrite", {}),
    "curated_kl": ("domain", "original", {"kl_weight": 0.5}),
    "rewritten_kl": ("domain", "rewrite", {"kl_weight": 0.5}),
    "rewritten_full": ("domain", "rewrite", {"method": "full", "learning_rate": 5e-5}),
    "curated_full": ("domain", "original", {"method": "full", "learning_rate": 5e-5}),
    "curated_kl_full": ("domain", "original", {"kl_weight": 0.5, "method": "full", "learning_rate": 5e-5}),
}
GENERAL = "alpaca"


def silent(_: int, __: str = "") -> None:
    """Nobody watches."""


class Bench:
    """The corpus, the student and what is kept of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.work = arguments, Path(arguments.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.base: ModelReference = reference(str(self.work))
        self.tokenizer = load_tokenizer(self.base)
        columns = ["instruction", "input", "output", "domain", "source"]
        files = sorted(glob.glob(f"{arguments.data}/corpus/*.parquet"))
        rows = pa.concat_tables([pq.read_table(file, columns=columns) for file in files]).to_pylist()
        order = np.random.default_rng(0).permutation(len(rows))
        self.rows: dict[str, list[dict[str, str]]] = {"random": [], "general": [], "domain": []}
        for row in (rows[index] for index in order):
            self.rows["random"].append(row)
            if row["source"] == GENERAL:
                self.rows["general"].append(row)
            if row["domain"] == arguments.domain:
                self.rows["domain"].append(row)
        self.held_out = {name: found[: arguments.held_out] for name, found in self.rows.items() if name != "random"}
        seen = {id(row) for found in self.held_out.values() for row in found}
        self.rows = {name: [row for row in found if id(row) not in seen] for name, found in self.rows.items()}
        # Calibration documents of their own too.
        self.calibration = self.rows["domain"][-arguments.calibration :]
        self.rows["domain"] = self.rows["domain"][: -arguments.calibration]

    def pairs(self, documents: str) -> list[Pair]:
        return [(question(row), row["output"]) for row in self.rows[documents][: self.arguments.documents]]

    def student(self) -> str:
        """The pruned model, a stock directory."""
        place = self.work / f"student-{self.arguments.domain}"
        if not place.exists():
            texts = [text(row) for row in self.calibration]
            batches = []
            tokens = tokenise(self.tokenizer, texts, 128)
            for batch in length_batches([len(ids) for ids in tokens], CPU_BATCH_TOKENS):
                ids, mask = pad_batch([tokens[index] for index in batch], self.tokenizer.pad_token_id)
                batches.append((torch.from_numpy(ids), torch.from_numpy(mask)))
            model = load_model(self.base)
            section = PruneSection.model_validate({"ratio": self.arguments.ratio, "general_documents": 0})
            source = BlocksInMemory(model, anatomy_of(model))
            pruned = prune_model(source, section, batches, Places(None, None), Clock(), silent).student
            pruned.save_pretrained(place.with_suffix(".part"))
            self.tokenizer.save_pretrained(place.with_suffix(".part"))
            place.with_suffix(".part").rename(place)
        return str(place)

    def rewrites(self) -> pa.Table:
        """`schemas.REWRITES` of the domain's documents, by the base model."""
        place = self.work / f"rewrites-{self.arguments.domain}.parquet"
        if not place.exists():
            pairs = self.pairs("domain")
            columns = {
                "doc_id": [f"{index:06d}" for index in range(len(pairs))],
                "prompt": [ask for ask, _ in pairs],
                "response": [answer for _, answer in pairs],
            }
            section = DistillSection.model_validate({"max_tokens": self.arguments.max_tokens})
            rewriter = rewriter_of(self.base, self.base, section, 8192)
            pq.write_table(rewriter(select_first(pa.table(columns), 1.0), silent), place)
        return pq.read_table(place)

    def examples(self, documents: str, responses: str) -> tuple[Example, ...]:
        if documents != "domain":
            pairs = self.pairs(documents)
        else:
            table = self.rewrites()
            column = "response" if responses == "rewrite" else "response_original"
            pairs = list(zip(table.column("prompt").to_pylist(), table.column(column).to_pylist(), strict=True))
        return build_examples(self.tokenizer, pairs, self.arguments.max_tokens).examples

    def teacher(self, responses: str) -> str:
        """Shard of `schemas.TEACHER_LOGPROBS` for the domain's documents."""
        place = self.work / f"teacher-{self.arguments.domain}-{responses}.parquet"
        if not place.exists():
            table = self.rewrites()
            if responses == "original":
                table = table.set_column(table.schema.get_field_index("response"), "response", table.column("response_original"))
            sizes = (self.base.vocab_size, self.arguments.max_tokens, 32, 1.0, CPU_BATCH_TOKENS)
            scorer = TeacherScorer(load_model(self.base), self.tokenizer, *sizes)
            pq.write_table(scorer(table), place)
        return str(place)

    def train(self, arm: str) -> tuple[str, dict[str, Any]]:
        """The trained student's directory, and how it went."""
        documents, responses, changes = ARMS[arm]
        if not documents:
            return self.student(), {}
        values = {
            "learning_rate": self.arguments.learning_rate,
            "batch_size": self.arguments.batch_size,
            "max_tokens": self.arguments.max_tokens,
            "micro_batch_tokens": 2048,
            "zero_stage": 0,
            "held_out": 0,
        }
        section = DistillSection.model_validate({**values, **changes})
        examples = self.examples(documents, responses)
        home = self.work / f"{self.arguments.domain}-{arm}"
        shutil.rmtree(home, ignore_errors=True)
        told = (self.teacher(responses),) if section.kl_weight else ()
        checkpoints = str(home / "checkpoints")
        job = TrainJob(self.student(), examples, section, checkpoints, str(home), self.arguments.tokens, told)
        began = time.monotonic()
        train(job, PlainEngine, silent)
        shutil.rmtree(checkpoints)
        planned = plan(job)
        rows = storage.read_parquet(str(home / "metrics" / "part-00000.parquet")).to_pylist()
        padding = [row["value"] for row in rows if row["name"] == "padding_share"]
        facts = {
            "training_tokens": planned.tokens,
            "steps": len(planned.steps),
            "tokens_per_second": planned.tokens / (time.monotonic() - began),
            "useful_tokens": 1 - float(np.mean(padding)),
        }
        return str(home / "model"), facts

    def measure(self, model: PreTrainedModel, directory: str) -> dict[str, float]:
        """Perplexities of whole texts and of answers."""
        found = {}
        for name, rows in self.held_out.items():
            tokens = tokenise(self.tokenizer, [text(row) for row in rows], 128)
            pad = self.tokenizer.pad_token_id
            found[f"{name}_text"] = perplexity_of_documents(model, tokens, CPU_BATCH_TOKENS, pad, silent).value
            found[f"{name}_answer"] = self.answers(directory, [(question(row), row["output"]) for row in rows])
        if self.arguments.domain == "math":
            table = pq.read_table(f"{self.arguments.data}/eval/gsm8k_test.parquet").slice(0, self.arguments.held_out).to_pylist()
            found["gsm8k_answer"] = self.answers(directory, [(row["question"], row["answer"]) for row in table])
        return found

    def answers(self, directory: str, pairs: list[Pair]) -> float:
        examples = build_examples(self.tokenizer, pairs, self.arguments.max_tokens).examples
        student = load_student(Path(directory), "full", 1, 0, Mixture(0.0), recompute=False)
        engine, step = PlainEngine(student, OptimizerSettings(0.0, 1.0)), whole(examples, np.arange(len(examples)))
        return answer_perplexity(engine, examples, step)


def answer_perplexity(engine: PlainEngine, examples: tuple[Example, ...], step: Step) -> float:
    """exp of the mean negative log-likelihood of the tokens that would be trained on."""
    total = 0.0
    with torch.no_grad():
        for rows in passes_of(step, 0, 1, 2048, True):
            batch = collate(examples, step, rows)
            arrays = (batch.tokens, batch.targets, batch.positions)
            tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
            total += float(engine(*tensors, None, None)[0])
    return math.exp(total / loss_tokens(examples, step))


def question(row: dict[str, str]) -> str:
    return "\n".join(part for part in (row["instruction"], row["input"]) if part)


def text(row: dict[str, str]) -> str:
    return "\n".join(row[name] for name in ("instruction", "input", "output"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--domain", default="math")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tokens", type=int, default=150_000, help="of training, the same for every arm")
    parser.add_argument("--documents", type=int, default=900, help="of a set")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of LoRA; full fine-tuning takes 5e-5")
    parser.add_argument("--max-tokens", type=int, default=256)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for arm in arguments.arms:
        directory, facts = bench.train(arm)
        model = load_model(reference_of(directory, bench.base, arm))
        print(json.dumps({"arm": arm, "perplexity": bench.measure(model, directory), **facts}), flush=True)


if __name__ == "__main__":
    main()
