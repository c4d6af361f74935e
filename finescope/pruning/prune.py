"""Prune a model for a domain: importance, allocation, surgery, compensation. Saving and verifying are the caller's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from finescope.config import PruneSection
from finescope.models.anatomy import Anatomy
from finescope.models.groups import Layout, layout_of
from finescope.pruning.allocation import choose
from finescope.pruning.compensation import compensate
from finescope.pruning.groups import Kept
from finescope.pruning.importance import Batch, Importance, Progress, magnitude_importance, random_importance, taylor_importance
from finescope.pruning.ridge import Refit
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
        RecipeError: the ratio cannot be reached, or the model cannot lose what `section.structure` names.
        ModelError: the model's class is not a stock one.
        StepFailed: the calibration set is empty or something is not finite.
    """
    assert not model.training
    layout = layout_of(model, anatomy)
    importance = importance_of(model, anatomy, layout, section, batches, progress)
    kept = choose(importance, layout, section.ratio, section.structure, section.round_to)
    student = cut(model, anatomy, layout, kept)
    refits = compensate(model, student, anatomy, batches, progress) if _refits(section) else []
    after = layout_of(student, anatomy)
    summary = {
        "parameters_before": layout.model_params,
        "parameters_after": after.model_params,
        "block_parameters_before": layout.block_params,
        "block_parameters_after": after.block_params,
        "ratio": section.ratio,
        "ratio_reached": 1 - after.block_params / layout.block_params,
        **_sizes(layout, "before"),
        **_sizes(after, "after"),
        "architecture": type(student).__name__,
        "calibration_documents": sum(len(mask) for _, mask in batches),
        "calibration_tokens": _num_tokens(batches),
        "compensated": bool(refits),
        **_experts(importance, refits),
        "refits": [refit._asdict() for refit in refits],
    }
    return PruneResult(student, importance_table(importance, layout, kept), summary)


def planned_tokens(section: PruneSection, num_tokens: int) -> int:
    """What `progress` sums to: the calibration tokens once for Taylor importance and once for compensation."""
    return num_tokens * (section.reads_documents + _refits(section))


def importance_table(importance: Importance, layout: Layout, kept: Kept) -> pa.Table:
    """One row a group, ordered by layer, kind and index.

    A channel c of expert e is group e * channels + c. Its parameters are also those of the expert: where that leaves, none of
    its channels is kept. `general` is null.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in IMPORTANCE.names if name != "general"}
    for layer in range(layout.num_layers):
        for index, groups in enumerate(layout.groups):
            if layer not in groups.layers:
                continue
            position = groups.layers.index(layer)
            stays = np.zeros((groups.rows, groups.number), dtype=bool)
            np.put_along_axis(stays, kept[index][position], True, axis=1)
            if groups.by_expert:
                stays &= np.isin(np.arange(groups.rows), kept[layout.find("experts", layer)[0]][position])[:, None]
            columns["layer"].append(np.full(stays.size, layer + 1))
            columns["kind"].append(np.full(stays.size, groups.kind))
            columns["group_index"].append(np.arange(stays.size))
            columns["importance"].append(importance.values[index][position].reshape(-1))
            columns["num_params"].append(np.full(stays.size, groups.params))
            columns["kept"].append(stays.reshape(-1))
    table = pa.table({name: np.concatenate(parts) for name, parts in columns.items()})
    return conform(table.append_column("general", pa.nulls(table.num_rows)), IMPORTANCE)


def importance_of(
    model: PreTrainedModel, anatomy: Anatomy, layout: Layout, section: PruneSection, batches: Sequence[Batch], progress: Progress
) -> Importance:
    """The importance of each group by `section.method`.

    Raises:
        StepFailed: as the method says.
    """
    match section.method:
        case "taylor":
            return taylor_importance(model, anatomy, layout, batches, progress)
        case "magnitude":
            return magnitude_importance(model, anatomy, layout)
        case "random":
            return random_importance(layout, section.seed)


def _sizes(layout: Layout, when: str) -> dict[str, int]:
    """What a block has of each kind."""
    names = {("mlp", False): "mlp_channels", ("mlp", True): "expert_channels", ("experts", False): "experts"}
    sizes = {"query_heads": layout.heads.num_query, "kv_heads": layout.heads.num_kv}
    sizes |= {
        names[groups.kind, groups.by_expert]: groups.number
        for groups in layout.groups
        if (groups.kind, groups.by_expert) in names
    }
    return {f"{name}_{when}": size for name, size in sizes.items()}


def _experts(importance: Importance, refits: Sequence[Refit]) -> dict[str, Any]:
    """How the calibration set uses a mixture of experts; empty for a dense model."""
    tokens, facts = importance.expert_tokens, {}
    if tokens:
        unused = {layer + 1: np.flatnonzero(counts == 0).tolist() for layer, counts in tokens.items()}
        facts["experts_without_tokens"] = sum(map(len, unused.values()))
        facts["unused_experts"] = {str(layer): experts for layer, experts in unused.items() if experts}
    left_out = [refit.experts_left_out for refit in refits if refit.experts_left_out is not None]
    if left_out:
        facts["experts_not_refitted"] = sum(left_out)
    return facts


def _refits(section: PruneSection) -> bool:
    # With nothing removed there is nothing to compensate, and a re-fit would only add rounding.
    return section.compensate and section.ratio > 0


def _num_tokens(batches: Sequence[Batch]) -> int:
    return sum(int(mask.sum()) for _, mask in batches)
