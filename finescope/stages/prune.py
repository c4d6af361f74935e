"""`prune`: a smaller student of the run's model, chosen on the curated documents, proven to load without finescope."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from finescope import directories, storage
from finescope.config import CorpusSection, PruneSection
from finescope.corpus.tokenise import length_batches, pad_batch, tokenise
from finescope.models.anatomy import anatomy_of
from finescope.models.load import ModelReference, load_model, load_tokenizer, reference_of
from finescope.pruning.prune import planned_tokens, prune_model
from finescope.pruning.verify import verify_saved
from finescope.rounds import Round
from finescope.runners.base import Context, Progress, Resources
from finescope.stages.cards import model_card
from finescope.stages.references import memory_bytes, model_of, random_documents, read_located, read_shards, write_table
from finescope.steps import Outcome, StepInput

# Tokens of a forward and backward pass over calibration documents, padding included.
_BATCH_TOKENS = 1024
# Facts that are lists, or of the model that a later round was given.
_NOT_ON_THE_CARD = ("refits", "unused_experts", "blocks", "of_input")


@dataclass(frozen=True)
class _Job:
    """What the machine that prunes is sent."""

    base: ModelReference  # the run's model
    source: str  # the same as the recipe names it
    model: ModelReference  # what is pruned: that, or what the round before has made of it
    section: PruneSection
    tokens: tuple[np.ndarray, ...]  # int32 [T] a calibration document
    uri: str  # where the student goes


def prune(context: Context, corpus: CorpusSection, turn: Round, cautions: Sequence[str], step: StepInput) -> Outcome:
    """Prune the model, or what the round before has made of it, on the curated documents or on random ones of the corpus.

    Raises:
        RecipeError: `prune.ratio` cannot be reached, or the model cannot lose what `prune.structure` names.
        StepFailed: the saved student does not give the logits of the one in memory.
    """
    if turn.before is None:
        for caution in cautions:
            context.reporter.warn(caution)
    base = model_of(step["model"])
    model = base if turn.before is None else model_of(step[turn.before])
    section = turn.pruning.model_copy(update={"ratio": _share_left_to_remove(turn.pruning.ratio, base, model)})
    texts = calibration_texts(context, corpus, section, step)
    student_uri = storage.join(step.uri, "model")
    tokens = tuple(tokenise(load_tokenizer(model), texts, section.max_tokens))
    job = _Job(base, step["model"].facts["source"], model, section, tokens, student_uri)
    planned = planned_tokens(section, sum(len(item) for item in tokens))
    with context.reporter.task(turn.prune, planned, "tokens") as progress:
        importance, summary = context.runner.call(_prune, (job,), progress, Resources(memory_bytes(model, 3.0)))
    tables = {"importance": write_table(step.uri, "importance", importance)}
    reference = reference_of(student_uri, model, step.identity)
    facts = {"reference": reference.model_dump(mode="json"), **summary, "cautions": list(cautions)}
    return Outcome(importance.num_rows, importance.num_rows, 0, tables, facts)


def _share_left_to_remove(ratio: float, base: ModelReference, model: ModelReference) -> float:
    """What is to be removed of `model`, so that `ratio` of the base model's block parameters is gone."""
    return max(0.0, 1 - (1 - ratio) * base.block_parameters / model.block_parameters) if model != base else ratio


def calibration_texts(context: Context, corpus: CorpusSection, section: PruneSection, step: StepInput) -> tuple[str, ...]:
    """Texts of the calibration documents: the best of the curated set, or random ones."""
    if section.calibration == "random":
        located = random_documents(step, section.documents, section.seed, ())
        table = read_located(context, step["index"], model_of(step["model"]), corpus, located, "prune: reading")
    else:
        table = read_shards(step["curate"], "curated", ["text"], section.documents)
    return tuple(table.column("text").to_pylist())


def _prune(job: _Job, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
    model = load_model(job.model)
    tokenizer = load_tokenizer(job.model)
    tokens = job.tokens
    batches = []
    for batch in length_batches([len(item) for item in tokens], _BATCH_TOKENS):
        ids, mask = pad_batch([tokens[index] for index in batch], tokenizer.pad_token_id)
        batches.append((torch.from_numpy(ids).to(model.device), torch.from_numpy(mask).to(model.device)))
    result = prune_model(model, anatomy_of(model), job.section, batches, progress)
    facts = result.summary if job.model == job.base else _against_base(result.summary, job.base)
    with directories.scratch_directory(job.uri) as local:
        result.student.save_pretrained(local)
        tokenizer.save_pretrained(local)
        told = {key: value for key, value in facts.items() if key not in _NOT_ON_THE_CARD}
        (local / "README.md").write_text(model_card(job.base, job.source, "pruned", told), encoding="utf-8")
        verified = verify_saved(local, result.student, batches[0][0][:1, :32])
        directories.put_tree(local, job.uri)
    return result.importance, {**facts, "reload": verified._asdict()}


def _against_base(summary: dict[str, Any], base: ModelReference) -> dict[str, Any]:
    """A later round's summary: what the model has lost since it was whole, and under `of_input` what this round took of it."""
    own = ("parameters_before", "block_parameters_before", "ratio", "ratio_reached")
    kept = 1 - summary["ratio"]
    return {
        **summary,
        "parameters_before": base.num_parameters,
        "block_parameters_before": base.block_parameters,
        "ratio": 1 - kept * summary["block_parameters_before"] / base.block_parameters,
        "ratio_reached": 1 - summary["block_parameters_after"] / base.block_parameters,
        "of_input": {name: summary[name] for name in own},
    }
