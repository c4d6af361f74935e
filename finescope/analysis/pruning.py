"""What the tables of `prune` say: what left, how far the domain ranks groups as general text does, latents of heads."""

import polars as pl

_PLACE = ("layer", "kind")


def pruned_groups(importance: pl.LazyFrame) -> pl.DataFrame:
    """By layer and kind: kept, removed (groups), params_removed, importance_removed (share of the layer's importance of
    that kind), and correlation and differing of `agreement`."""
    kept, value = pl.col("kept"), pl.col("importance").cast(pl.Float64)
    columns = [
        kept.sum().alias("kept"),
        (~kept).sum().alias("removed"),
        pl.col("num_params").filter(~kept).sum().alias("params_removed"),
        (value.filter(~kept).sum() / value.sum()).fill_nan(0.0).alias("importance_removed"),
    ]
    groups = importance.group_by(_PLACE).agg(columns).collect()
    return groups.join(agreement(importance), on=_PLACE, how="left").sort("kind", "layer")


def agreement(importance: pl.LazyFrame) -> pl.DataFrame:
    """How far the domain ranks the groups of a layer as general text does, where the table knows the general importance.

    Returns:
        layer, kind; correlation: Spearman's, null where one side has all groups equal or there is one group; differing: share
        of the groups that would have stayed instead of left, or left instead of stayed, had as many been chosen by the general
        importance. Channels of experts are chosen within their expert; those of an expert that left are not counted.
    """
    experts = (pl.col("kind") == "experts").sum().over("layer")
    in_experts = (pl.col("kind") == "mlp") & (experts > 0)
    channels = pl.len().over(_PLACE) // pl.max_horizontal(experts, 1)
    rows = importance.with_columns(expert=pl.when(in_experts).then(pl.col("group_index") // channels).otherwise(0))
    row = (*_PLACE, "expert")
    kept = pl.col("kept").sum().over(row)
    chosen = pl.col("general").rank("ordinal", descending=True).over(row) <= kept
    compared = rows.filter(pl.col("general").is_not_null()).with_columns(differs=chosen != pl.col("kept"), counted=kept > 0)
    correlation = pl.corr(pl.col("importance").rank(), pl.col("general").rank()).fill_nan(None)
    differing = pl.col("differs").filter("counted").mean()
    return compared.group_by(_PLACE).agg(correlation=correlation, differing=differing).sort("kind", "layer").collect()


def importance_map(importance: pl.LazyFrame, kind: str, bins: int) -> pl.DataFrame:
    """The groups of a kind, block by block, in cells: each group by its index where no block has more than `bins`, else at most
    `bins` cells of groups, most important first, what was kept before what was removed.

    Returns:
        layer, cell (0-based), importance (mean over the cell's groups), kept (whether most of them were).
    """
    groups = importance.filter(pl.col("kind") == kind)
    size = pl.len().over("layer")
    if (groups.select(size.max()).collect().item() or 0) <= bins:
        placed = groups.with_columns(cell=pl.col("group_index"))
    else:
        place = pl.int_range(pl.len()).over("layer")
        ordered = groups.sort(["layer", "kept", "importance"], descending=[False, True, True])
        placed = ordered.with_columns(cell=place * pl.min_horizontal(size, pl.lit(bins)) // size)
    means = [pl.col("importance").cast(pl.Float64).mean(), (pl.col("kept").mean() >= 0.5).alias("kept")]
    return placed.group_by("layer", "cell").agg(means).collect().sort("layer", "cell")


def head_latents(latents: pl.LazyFrame, count: int) -> pl.DataFrame:
    """The `count` latents of each head that its activation rises with most: the columns of schemas.HEAD_LATENTS."""
    ordered = latents.sort(["layer", "group_index", "correlation", "latent"], descending=[False, False, True, False])
    columns = latents.collect_schema().names()
    return ordered.group_by("layer", "group_index", maintain_order=True).head(count).select(columns).collect()
