"""Prune a model for a domain, one block in memory at a time: depth, importance, allocation, then surgery and
compensation by block.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from finescope.config import PruneSection
from finescope.models.blocks import Blocks, without_blocks
from finescope.models.groups import Layout, layout_of
from finescope.pruning.activation import activation_importance
from finescope.pruning.allocation import choose
from finescope.pruning.depth import choose_blocks
from finescope.pruning.groups import Kept, all_of
from finescope.pruning.hidden import hidden_states
from finescope.pruning.importance import Importance, magnitude_importance, random_importance
from finescope.pruning.measured import Clock
from finescope.pruning.probe import Case
from finescope.pruning.ridge import Refit
from finescope.pruning.stream import Batch, Progress
from finescope.pruning.student import build_student
from finescope.pruning.surgery import Surgery
from finescope.pruning.taylor import taylor_importance
from finescope.schemas import IMPORTANCE, conform


class Places(NamedTuple):
    """Where pruning writes."""

    spill_to: Path | None  # a directory for hidden states at block boundaries; None: they stay in memory
    student: Path | None  # the student's directory, not made yet; None: it stays in memory


class PruneResult(NamedTuple):
    """A pruned model and how it came about."""

    student: PreTrainedModel  # a stock model in eval mode; where it was written the weights of its blocks are gone from memory
    importance: pa.Table  # schemas.IMPORTANCE: one row a group; layer is 1-based as in `sae.layer`, group_index 0-based
    summary: dict[str, Any]  # plain JSON: parameters, ratio reached, sizes kept, calibration, error of each re-fit
    cases: list[Case]  # what the student computes


def prune_model(
    source: Blocks, section: PruneSection, batches: Sequence[Batch], places: Places, clock: Clock, progress: Progress
) -> PruneResult:
    """Remove about `section.ratio` of the block parameters of a model, chosen and compensated on `batches`.

    The model is not changed. The batches are the calibration set: (input_ids, attention_mask), int64 [documents, tokens], padded
    on the right. `progress` is called with tokens, `planned_tokens` in all.

    Raises:
        RecipeError: the ratio cannot be reached, or the model cannot lose what `section.structure` names.
        ModelError: the model's class is not a stock one.
        StepFailed: the calibration set is empty or something is not finite.
    """
    assert not source.model.training
    layout = layout_of(source.model, source.anatomy)
    shallower, inner, depth, importance = source, layout, None, None
    if section.removes_blocks:
        with clock.part("depth"):
            depth = choose_blocks(source, batches, section.ratio, bool(section.within_blocks), progress)
        shallower = without_blocks(source, depth.kept)
        inner = layout_of(shallower.model, source.anatomy)
    origins, kept = tuple(range(layout.num_layers)) if depth is None else depth.kept, all_of(inner)
    if section.within_blocks:
        with clock.part("importance"):
            importance = importance_by_method(shallower, inner, section, batches, places.spill_to, progress)
        with clock.part("selection"):
            rest = max(0.0, 1 - (1 - section.ratio) * layout.block_params / inner.block_params)
            kept = choose(
                importance, inner, rest, section.within_blocks, section.round_to, required=inner.num_layers == layout.num_layers
            )
    with clock.part("compensation"):
        surgery = Surgery(shallower.model, source.anatomy, inner, kept)
        fitted_on = batches if _refits(section) else ()
        refits, cases = build_student(source, origins, surgery, fitted_on, places.student, clock, progress)
    student = surgery.student
    after = layout_of(student, source.anatomy)
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
        **({} if depth is None else {"blocks": depth.summary()}),
        **({} if importance is None else _experts(importance, origins)),
        **_experts_left_out(refits),
        "refits": [refit._asdict() for refit in refits],
    }
    tables = [] if depth is None else [depth.rows()]
    tables += [] if importance is None else [importance_table(importance, inner, kept, origins)]
    return PruneResult(student, pa.concat_tables(tables).sort_by("layer"), summary, cases)


def planned_tokens(section: PruneSection, num_tokens: int) -> int:
    """What `progress` sums to: the calibration tokens once for each of depth, an importance that runs them and compensation."""
    return num_tokens * (section.removes_blocks + section.reads_documents + _refits(section))


def importance_table(importance: Importance, layout: Layout, kept: Kept, origins: Sequence[int]) -> pa.Table:
    """One row a group, ordered by layer, kind and index. `origins` are the layers that those of `layout` are of, 0-based.

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
            columns["layer"].append(np.full(stays.size, origins[layer] + 1))
            columns["kind"].append(np.full(stays.size, groups.kind))
            columns["group_index"].append(np.arange(stays.size))
            columns["importance"].append(importance.values[index][position].reshape(-1))
            columns["num_params"].append(np.full(stays.size, groups.params))
            columns["kept"].append(stays.reshape(-1))
    table = pa.table({name: np.concatenate(parts) for name, parts in columns.items()})
    return conform(table.append_column("general", pa.nulls(table.num_rows)), IMPORTANCE)


def importance_by_method(
    source: Blocks,
    layout: Layout,
    section: PruneSection,
    batches: Sequence[Batch],
    spill_to: Path | None,
    progress: Progress,
) -> Importance:
    """The importance of each group by `section.method`; `spill_to` as in `Places`.

    Raises:
        StepFailed: as the method says.
    """
    match section.method:
        case "taylor" | "taylor_second":
            order = 1 if section.method == "taylor" else 2
            with hidden_states(spill_to) as boundaries:
                return taylor_importance(source, layout, order, batches, boundaries, progress)
        case "activation" | "wifv":
            return activation_importance(source, layout, section.method, batches, progress)
        case "magnitude":
            return magnitude_importance(source, layout)
        case "random":
            return random_importance(layout, section.seed)


def _sizes(layout: Layout, when: str) -> dict[str, int]:
    """How many blocks there are, and what one has of each kind."""
    names = {("mlp", False): "mlp_channels", ("mlp", True): "expert_channels", ("experts", False): "experts"}
    sizes = {"blocks": layout.num_layers, "query_heads": layout.heads.num_query, "kv_heads": layout.heads.num_kv}
    sizes |= {
        names[groups.kind, groups.by_expert]: groups.number
        for groups in layout.groups
        if (groups.kind, groups.by_expert) in names
    }
    return {f"{name}_{when}": size for name, size in sizes.items()}


def _experts(importance: Importance, origins: Sequence[int]) -> dict[str, Any]:
    """How the calibration set uses a mixture of experts; empty for a dense model."""
    if not importance.expert_tokens:
        return {}
    unused = {origins[layer] + 1: np.flatnonzero(counts == 0).tolist() for layer, counts in importance.expert_tokens.items()}
    named = {str(layer): experts for layer, experts in unused.items() if experts}
    return {"experts_without_tokens": sum(map(len, unused.values())), "unused_experts": named}


def _experts_left_out(refits: Sequence[Refit]) -> dict[str, int]:
    left_out = [refit.experts_left_out for refit in refits if refit.experts_left_out is not None]
    return {"experts_not_refitted": sum(left_out)} if left_out else {}


def _refits(section: PruneSection) -> bool:
    # With nothing removed there is nothing to compensate, and a re-fit would only add rounding.
    return section.compensate and section.ratio > 0


def _num_tokens(batches: Sequence[Batch]) -> int:
    return sum(int(mask.sum()) for _, mask in batches)
