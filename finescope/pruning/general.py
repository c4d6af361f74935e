"""The domain's importance beside the general one: the same groups, measured again on random documents of the corpus."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from finescope.config import PruneSection
from finescope.models.blocks import Blocks
from finescope.models.groups import Layout, layout_of
from finescope.pruning.importance import Importance
from finescope.pruning.prune import importance_by_method
from finescope.pruning.stream import Batch, Progress
from finescope.schemas import IMPORTANCE, conform

_GROUP = ("layer", "kind", "group_index")


class Head(NamedTuple):
    """A group of heads: a key/value head with its query heads."""

    layer: int  # 1-based
    group: int  # 0-based, its `group_index`


def with_general(
    table: pa.Table,
    source: Blocks,
    section: PruneSection,
    batches: Sequence[Batch],
    spill_to: Path | None,
    progress: Progress,
) -> pa.Table:
    """`table` of schemas.IMPORTANCE with `general`, the importance that its groups have on `batches`.

    The model is the one that was pruned, and `spill_to`, as `prune_model` was given them. `progress` is called with the tokens of
    the batches.

    Raises:
        StepFailed: no document has two tokens, or the importance is not finite.
    """
    layout = layout_of(source.model, source.anatomy)
    importance = importance_by_method(source, layout, section, batches, spill_to, progress)
    rows = pl.from_arrow(table.drop_columns("general"))
    assert isinstance(rows, pl.DataFrame)
    joined = rows.join(_by_group(importance, layout), on=_GROUP, how="left", maintain_order="left")
    return conform(joined.to_arrow(), IMPORTANCE)


def heads_of_domain(importance: pa.Table, most: int) -> list[Head]:
    """The heads that the domain asks more of than general text does, at most `most`, the most different first.

    They are compared by the ratio of their shares of the importance of their layer's heads, as the two sets differ in their
    losses, and so in the scale of all importances. A head whose share is not larger in the domain is none of them.
    """
    frame = pl.from_arrow(importance)
    assert isinstance(frame, pl.DataFrame)
    here, general = (pl.col(name).cast(pl.Float64) for name in ("importance", "general"))
    ratio = (here / here.sum().over("layer")) / (general / general.sum().over("layer"))
    heads = frame.filter(pl.col("kind") == "heads").with_columns(ratio=ratio.fill_nan(None)).filter(pl.col("ratio") > 1)
    ordered = heads.sort("ratio", "layer", "group_index", descending=[True, False, False]).head(most)
    return [Head(*place) for place in ordered.select("layer", "group_index").iter_rows()]


def _by_group(importance: Importance, layout: Layout) -> pl.DataFrame:
    """layer, kind, group_index, general: a row a group."""
    parts = [
        pl.DataFrame(
            {"layer": layer + 1, "group_index": np.arange(values.size, dtype=np.int32), "general": values.reshape(-1)},
            schema_overrides={"layer": pl.Int32},
        ).with_columns(kind=pl.lit(groups.kind, pl.String))
        for groups, of_layers in zip(layout.groups, importance.values, strict=True)
        for layer, values in zip(groups.layers, of_layers, strict=True)
    ]
    return pl.concat(parts)
