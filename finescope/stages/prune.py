"""`prune`: a smaller student of the run's model, chosen on the curated documents, proven to load without finescope."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from finescope import directories, storage
from finescope.analysis.pruning import agreement
from finescope.config import CorpusSection, PruneSection
from finescope.models.anatomy import anatomy_of
from finescope.models.load import ModelReference, load_model, load_tokenizer, reference_of
from finescope.pruning.general import with_general
from finescope.pruning.prune import planned_tokens, prune_model
from finescope.pruning.verify import verify_saved
from finescope.runners.base import Context, Progress, Resources
from finescope.stages.calibration import Documents, batches_of, calibration_documents, general_documents
from finescope.stages.cards import model_card
from finescope.stages.head_latents import head_latents
from finescope.stages.references import memory_bytes, model_of, write_table
from finescope.steps import Outcome, StepInput


@dataclass(frozen=True)
class _Job:
    """What the machine that prunes is sent."""

    model: ModelReference
    source: str  # the model as the recipe names it
    section: PruneSection
    tokens: tuple[np.ndarray, ...]  # int32 [T] a calibration document
    general: tuple[np.ndarray, ...]  # int32 [T] a general document
    uri: str  # where the student goes


def prune(context: Context, corpus: CorpusSection, section: PruneSection, step: StepInput) -> Outcome:
    """Prune the model on the curated documents, or on random ones of the corpus.

    Raises:
        RecipeError: `prune.ratio` cannot be reached, or the model cannot lose what `prune.structure` names.
        StepFailed: the saved student does not give the logits of the one in memory.
    """
    model, student_uri = model_of(step["model"]), storage.join(step.uri, "model")
    calibration = calibration_documents(context, corpus, section, step)
    general = general_documents(context, corpus, section, step, calibration.ids)
    job = _Job(model, step["model"].facts["source"], section, calibration.tokens, general.tokens, student_uri)
    planned = planned_tokens(section, calibration.num_tokens) + general.num_tokens
    with context.reporter.task("prune", planned, "tokens") as progress:
        importance, summary = context.runner.call(_prune, (job,), progress, Resources(memory_bytes(model, 3.0)))
    tables = {"importance": write_table(step.uri, "importance", importance)}
    if general.ids:
        found = head_latents(context, model, importance, calibration, general, step)
        tables["head_latents"] = write_table(step.uri, "head_latents", found)
        summary |= _agreement(importance, general)
    reference = reference_of(student_uri, model, step.identity)
    facts = {"reference": reference.model_dump(mode="json"), **summary}
    return Outcome(importance.num_rows, importance.num_rows, 0, tables, facts)


def _agreement(importance: pa.Table, general: Documents) -> dict[str, Any]:
    """How far the domain ranks the groups as general text does: rank correlation over layers and kinds."""
    rows = pl.from_arrow(importance)
    assert isinstance(rows, pl.DataFrame)
    found = agreement(rows.lazy())["correlation"].drop_nulls()
    return {
        "general_documents": len(general.ids),
        "general_tokens": general.num_tokens,
        "general_correlation_mean": found.mean(),
        "general_correlation_lowest": found.min(),
    }


def _prune(job: _Job, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
    model = load_model(job.model)
    tokenizer = load_tokenizer(job.model)
    anatomy, pad = anatomy_of(model), tokenizer.pad_token_id
    batches, _ = batches_of(job.tokens, pad, model.device)
    result = prune_model(model, anatomy, job.section, batches, progress)
    importance = result.importance
    if job.general:
        general, _ = batches_of(job.general, pad, model.device)
        importance = with_general(importance, model, anatomy, job.section, general, progress)
    with directories.scratch_directory(job.uri) as local:
        result.student.save_pretrained(local)
        tokenizer.save_pretrained(local)
        summary = {key: value for key, value in result.summary.items() if key not in ("refits", "unused_experts")}
        (local / "README.md").write_text(model_card(job.model, job.source, "pruned", summary), encoding="utf-8")
        verified = verify_saved(local, result.student, batches[0][0][:1, :32])
        directories.put_tree(local, job.uri)
    return importance, {**result.summary, "reload": verified._asdict()}
