"""`prune`: a smaller student of the run's model, chosen on the curated documents, proven to load without finescope."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from finescope import directories, storage
from finescope.analysis.pruning import agreement
from finescope.config import CorpusSection, PruneSection
from finescope.corpus.tokenise import length_batches
from finescope.models.blocks import open_blocks
from finescope.models.load import ModelReference, default_device, load_meta_model, load_tokenizer, reference_of
from finescope.models.memory import peak_memory
from finescope.pruning.cost import PruneCost, prune_cost
from finescope.pruning.general import with_general
from finescope.pruning.measured import Clock
from finescope.pruning.prune import Places, planned_tokens, prune_model
from finescope.pruning.verify import verify_saved
from finescope.rounds import Round
from finescope.runners.base import Context, Progress, Resources
from finescope.stages.calibration import BATCH_TOKENS, Documents, batches_of, calibration_documents, general_documents
from finescope.stages.cards import model_card
from finescope.stages.head_latents import head_latents
from finescope.stages.references import PROCESS_BYTES, bytes_per_parameter, model_of, write_table
from finescope.steps import Outcome, StepInput

# Facts that are lists, or of the model that a later round was given.
_NOT_ON_THE_CARD = ("refits", "unused_experts", "blocks", "of_input")


@dataclass(frozen=True)
class PruneJob:
    """What the machine that prunes is sent."""

    base: ModelReference  # the run's model
    source: str  # the same as the recipe names it
    model: ModelReference  # what is pruned: that, or what the round before has made of it
    section: PruneSection
    tokens: tuple[np.ndarray, ...]  # int32 [T] a calibration document
    general: tuple[np.ndarray, ...]  # int32 [T] a general document
    uri: str  # where the student goes
    spills: bool  # whether hidden states at block boundaries go to disk


def prune(context: Context, corpus: CorpusSection, turn: Round, cautions: Sequence[str], step: StepInput) -> Outcome:
    """Prune the model, or what the round before has made of it, on the curated documents or on random ones of the corpus.

    Raises:
        RecipeError: `prune.ratio` cannot be reached, or the model cannot lose what `prune.structure` names.
        StepFailed: the saved student does not give the logits of the one in memory.
    """
    if turn.before is None:
        for caution in cautions:
            context.reporter.warn(caution)
    base, student_uri = model_of(step["model"]), storage.join(step.uri, "model")
    model = base if turn.before is None else model_of(step[turn.before])
    section = turn.pruning.model_copy(update={"ratio": _share_left_to_remove(turn.pruning.ratio, base, model)})
    calibration = calibration_documents(context, corpus, section, step)
    general = general_documents(context, corpus, section, step, calibration.ids)
    cost = _cost(model, section, calibration.tokens)
    context.reporter.note(_told(turn.prune, cost))
    source = step["model"].facts["source"]
    job = PruneJob(base, source, model, section, calibration.tokens, general.tokens, student_uri, cost.spills)
    planned = planned_tokens(section, calibration.num_tokens) + general.num_tokens
    with context.reporter.task(turn.prune, planned, "tokens") as progress:
        resources = Resources(PROCESS_BYTES + cost.memory_bytes)
        importance, summary = context.runner.call(prune_calibrated, (job,), progress, resources)
    tables = {"importance": write_table(step.uri, "importance", importance)}
    if general.ids:
        found = head_latents(context, model, importance, calibration, general, step)
        tables["head_latents"] = write_table(step.uri, "head_latents", found)
        summary |= _agreement(importance, general)
    reference = reference_of(student_uri, model, step.identity)
    facts = {"reference": reference.model_dump(mode="json"), **summary, "estimate": asdict(cost), "cautions": list(cautions)}
    return Outcome(importance.num_rows, importance.num_rows, 0, tables, facts)


def _share_left_to_remove(ratio: float, base: ModelReference, model: ModelReference) -> float:
    """What is to be removed of `model`, so that `ratio` of the base model's block parameters is gone."""
    return max(0.0, 1 - (1 - ratio) * base.block_parameters / model.block_parameters) if model != base else ratio


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


def _cost(model: ModelReference, section: PruneSection, tokens: Sequence[np.ndarray]) -> PruneCost:
    lengths = [len(item) for item in tokens]
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in length_batches(lengths, BATCH_TOKENS))
    size = bytes_per_parameter(model)
    return prune_cost(load_meta_model(model), section, size, padded, max(lengths, default=0), BATCH_TOKENS)


def _told(step: str, cost: PruneCost) -> str:
    disk = f" and {cost.scratch_bytes / 1e9:.1f} GB of scratch on disk" if cost.spills else ""
    return (
        f"{step}: at most {(PROCESS_BYTES + cost.memory_bytes) / 1e9:.1f} GB of memory{disk}; as many operations as "
        f"{cost.passes:.1f} forward and backward passes over the calibration tokens"
    )


def prune_calibrated(job: PruneJob, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
    """Prune, write, prove: the table `importance` and the facts. `progress` sums to `planned_tokens` and the general tokens.

    Raises:
        RecipeError, StepFailed: as `prune`.
    """
    device, clock = default_device(), Clock()
    with directories.scratch_directory(job.uri) as local, ExitStack() as opened:
        with clock.part("load"):
            source = opened.enter_context(open_blocks(job.model, device))
            tokenizer = load_tokenizer(job.model)
        places = Places(local.parent if job.spills else None, local)
        batches, _ = batches_of(job.tokens, tokenizer.pad_token_id)
        result = prune_model(source, job.section, batches, places, clock, progress)
        importance = result.importance
        if job.general:
            with clock.part("general"):
                general, _ = batches_of(job.general, tokenizer.pad_token_id)
                importance = with_general(importance, source, job.section, general, places.spill_to, progress)
        facts = result.summary if job.model == job.base else _against_base(result.summary, job.base)
        with clock.part("save"):
            tokenizer.save_pretrained(local)
            told = {key: value for key, value in facts.items() if key not in _NOT_ON_THE_CARD}
            settings = {"prune": job.section.model_dump(mode="json")}
            card = model_card(job.base, job.source, "pruned", told, settings)
            (local / "README.md").write_text(card, encoding="utf-8")
        with clock.part("verify"):
            verified = verify_saved(local, source.model.dtype, device, result.cases)
        with clock.part("save"):
            directories.put_tree(local, job.uri)
    taken = {"peak": peak_memory(device), "seconds": clock.seconds}
    return importance, {**facts, "reload": verified._asdict(), **taken}


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
