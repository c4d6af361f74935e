"""`prune`: a smaller student of the run's model, chosen on the curated documents, proven to load without finescope."""

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
from finescope.runners.base import Context, Progress, Resources
from finescope.stages.cards import model_card
from finescope.stages.references import memory_bytes, model_of, random_documents, read_located, read_shards, write_table
from finescope.steps import Outcome, StepInput

# Tokens of a forward and backward pass over calibration documents, padding included.
_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class _Job:
    """What the machine that prunes is sent."""

    model: ModelReference
    source: str  # the model as the recipe names it
    section: PruneSection
    tokens: tuple[np.ndarray, ...]  # int32 [T] a calibration document
    uri: str  # where the student goes


def prune(context: Context, corpus: CorpusSection, section: PruneSection, step: StepInput) -> Outcome:
    """Prune the model on the curated documents, or on random ones of the corpus.

    Raises:
        RecipeError: `prune.ratio` cannot be reached, or the model cannot lose what `prune.structure` names.
        StepFailed: the saved student does not give the logits of the one in memory.
    """
    model = model_of(step["model"])
    texts = calibration_texts(context, corpus, section, step)
    student_uri = storage.join(step.uri, "model")
    tokens = tuple(tokenise(load_tokenizer(model), texts, section.max_tokens))
    job = _Job(model, step["model"].facts["source"], section, tokens, student_uri)
    planned = planned_tokens(section, sum(len(item) for item in tokens))
    with context.reporter.task("prune", planned, "tokens") as progress:
        importance, summary = context.runner.call(_prune, (job,), progress, Resources(memory_bytes(model, 3.0)))
    tables = {"importance": write_table(step.uri, "importance", importance)}
    reference = reference_of(student_uri, model, step.identity)
    facts = {"reference": reference.model_dump(mode="json"), **summary}
    return Outcome(importance.num_rows, importance.num_rows, 0, tables, facts)


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
    with directories.scratch_directory(job.uri) as local:
        result.student.save_pretrained(local)
        tokenizer.save_pretrained(local)
        summary = {key: value for key, value in result.summary.items() if key not in ("refits", "unused_experts")}
        (local / "README.md").write_text(model_card(job.model, job.source, "pruned", summary), encoding="utf-8")
        verified = verify_saved(local, result.student, batches[0][0][:1, :32])
        directories.put_tree(local, job.uri)
    return result.importance, {
        **result.summary,
        "reload": verified._asdict(),
    }
