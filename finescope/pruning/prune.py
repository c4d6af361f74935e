"""Prune a model for a domain: importance, allocation, surgery, compensation. Saving and verifying are the caller's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from finescope.config import PruneSection
from finescope.models.anatomy import Anatomy
from finescope.pruning.allocation import Kept, choose
from finescope.pruning.compensation import compensate
from finescope.pruning.groups import Groups, groups_of
from finescope.pruning.importance import Batch, Importance, Progress, magnitude_importance, random_importance, taylor_importance
from finescope.pruning.surgery import cut
from finescope.schemas import IMPORTANCE, conform


class PruneResult(NamedTuple):
    """A pruned model and how it came about."""

    student: PreTrainedModel  # a new stock model in eval mode
    importance: pa.Table  # schemas.IMPORTANCE: one row a group; layer is 1-based as in `sae.layer`, group_index 0-based
    summary: dict[str, Any]  # plain JSON: parameters, ratio reached, sizes kept, calibration, error of each re-fit


def prune_model(
    model: PreTrainedModel, anatomy: Anatomy, section: PruneSection, batches: Sequence[Batch], progress: Progress
) -> PruneResult:
    """Remove about `section.ratio` of the block parameters of `model`, chosen and compensated on `batches`.

    The model is in eval mode; it is not changed. The batches are the calibration set: (input_ids, attention_mask), int64
    [documents, tokens], padded on the right. `progress` is called with tokens, `planned_tokens` in all.

    Raises:
        RecipeError: the ratio cannot be reached.
        ModelError: no stock class holds the student.
        StepFailed: the calibration set is empty or something is not finite.
    """
    assert not model.training
    groups = groups_of(model, anatomy)
    importance = _importance(model, anatomy, groups, section, batches, progress)
    kept = choose(importance, groups, section.ratio, section.structure, section.round_to)
    student = cut(model, anatomy, groups, kept)
    refits = compensate(model, student, anatomy, batches, progress) if _refits(section) else []
    after = groups_of(student, anatomy)
    blocks_before, blocks_after = (sizes.num_layers * sizes.block_params for sizes in (groups, after))
    summary = {
        "parameters_before": groups.model_params,
        "parameters_after": after.model_params,
        "block_parameters_before": blocks_before,
        "block_parameters_after": blocks_after,
        "ratio": section.ratio,
        "ratio_reached": 1 - blocks_after / blocks_before,
        "kv_heads_before": groups.num_kv_heads,
        "kv_heads_after": after.num_kv_heads,
        "query_heads_before": groups.num_kv_heads * groups.queries_per_kv,
        "query_heads_after": after.num_kv_heads * after.queries_per_kv,
        "mlp_channels_before": groups.num_channels,
        "mlp_channels_after": after.num_channels,
        "architecture": type(student).__name__,
        "calibration_documents": sum(len(mask) for _, mask in batches),
        "calibration_tokens": _num_tokens(batches),
        "compensated": bool(refits),
        "refits": [refit._asdict() for refit in refits],
    }
    return PruneResult(student, importance_table(importance, groups, kept), summary)


def planned_tokens(section: PruneSection, num_tokens: int) -> int:
    """What `progress` sums to: the calibration tokens once for Taylor importance and once for compensation."""
    return num_tokens * ((section.method == "taylor") + _refits(section))


def importance_table(importance: Importance, groups: Groups, kept: Kept) -> pa.Table:
    """One row a group, ordered by layer, kind and index."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in IMPORTANCE.names}
    for layer in range(groups.num_layers):
        for kind, params in (("heads", groups.head_params), ("mlp", groups.channel_params)):
            values = getattr(importance, kind)[layer]
            indices = np.arange(len(values))
            columns["layer"].append(np.full(len(values), layer + 1))
            columns["kind"].append(np.full(len(values), kind))
            columns["group_index"].append(indices)
            columns["importance"].append(values)
            columns["num_params"].append(np.full(len(values), params))
            columns["kept"].append(np.isin(indices, getattr(kept, kind)[layer]))
    return conform(pa.table({name: np.concatenate(parts) for name, parts in columns.items()}), IMPORTANCE)


def _importance(
    model: PreTrainedModel, anatomy: Anatomy, groups: Groups, section: PruneSection, batches: Sequence[Batch], progress: Progress
) -> Importance:
    match section.method:
        case "taylor":
            return taylor_importance(model, anatomy, batches, progress)
        case "magnitude":
            return magnitude_importance(model, anatomy)
        case "random":
            return random_importance(groups, section.seed)


def _refits(section: PruneSection) -> bool:
    # With nothing removed there is nothing to compensate, and a re-fit would only add rounding.
    return section.compensate and section.ratio > 0


def _num_tokens(batches: Sequence[Batch]) -> int:
    return sum(int(mask.sum()) for _, mask in batches)
