"""The report's section on pruning."""

from typing import Any

import polars as pl
from markupsafe import Markup

from finescope.analysis import charts, pruning
from finescope.analysis.frames import frame_of
from finescope.manifest import Manifest

_KINDS = {"blocks": "blocks", "heads": "key/value heads", "experts": "experts", "mlp": "MLP channels"}
# Cells of a block's row in the map of its groups: enough to see the shape, few enough to be drawn.
_CELLS = 64
_LATENTS = 5


def pruning_section(manifest: Manifest, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template needs: the map of importance (chart), kinds, layers, facts, the correlation with general importance
    (a drawing) and the latents of heads, both empty where a run has none, and what each round took, as it was given."""
    importance = frame_of(manifest, "importance")
    groups = pruning.pruned_groups(importance)
    kinds = {kind: title for kind, title in _KINDS.items() if kind in groups["kind"]}
    maps = {title: pruning.importance_map(importance, kind, _CELLS) for kind, title in kinds.items()}
    totals = groups.group_by("kind").agg(
        pl.col("kept", "removed", "params_removed").sum(),
        pl.col("importance_removed", "correlation", "differing").mean(),
        pl.col("layer").n_unique().alias("layers"),
    )
    return {
        "chart": Markup(charts.importance_maps(maps)),
        "kinds": totals.sort("kind").to_dicts(),
        "titles": _KINDS,
        "layers": groups.to_dicts(),
        "facts": manifest.facts,
        "correlation": _correlation(groups),
        "heads": _heads(manifest),
        "rounds": rounds,
    }


def _correlation(groups: pl.DataFrame) -> Markup:
    """Rank correlation by layer, a line a kind."""
    known = groups.drop_nulls("correlation")
    if known.is_empty():
        return Markup()
    series = pl.col("kind").replace(_KINDS).alias("series")
    points = known.select(pl.col("layer").alias("x"), pl.col("correlation").alias("value"), series)
    return Markup(charts.lines(points, "rank correlation of the domain's importance with the general one", "layer"))


def _heads(manifest: Manifest) -> list[dict[str, Any]]:
    """Heads with their latents: layer, group_index, latents (rows)."""
    if "head_latents" not in manifest.tables:
        return []
    found = pruning.head_latents(frame_of(manifest, "head_latents"), _LATENTS)
    heads = found.group_by("layer", "group_index", maintain_order=True).agg(pl.struct(pl.all()).alias("latents"))
    return heads.to_dicts()
