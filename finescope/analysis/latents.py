"""What the table `latents` says of the dictionaries of a run: small Polars frames, aggregated before they are collected."""

import polars as pl

from finescope.sae.naming import DENSE_FREQUENCY

_LIVE = pl.col("frequency") > 0
_SHOWN = ("dictionary", "latent", "frequency", "mean_activation", "max_activation")


def dictionaries(latents: pl.LazyFrame) -> pl.DataFrame:
    """A row a dictionary, in the order of the table: dictionary, latents, l0 (active latents an activation), median_frequency
    (of live latents), dead, dead_share, dense, dense_share."""
    dense = pl.col("frequency") > DENSE_FREQUENCY
    columns = [
        pl.len().alias("latents"),
        pl.col("frequency").sum().alias("l0"),
        pl.col("frequency").filter(_LIVE).median().alias("median_frequency"),
        (~_LIVE).sum().alias("dead"),
        (~_LIVE).mean().alias("dead_share"),
        dense.sum().alias("dense"),
        dense.mean().alias("dense_share"),
    ]
    return latents.group_by("dictionary", maintain_order=True).agg(columns).collect()


def frequency_histogram(latents: pl.LazyFrame, per_decade: int) -> pl.DataFrame:
    """Live latents in equal intervals of log10 frequency, `per_decade` of them a power of ten: dictionary, low, high
    (frequencies), latents. Intervals without a latent are left out; dead latents have no logarithm and are in none."""
    # Active on all of the set: the interval below 1, which has no other upper end.
    number = (pl.col("frequency").log10() * per_decade).floor().clip(upper_bound=-1).cast(pl.Int32).alias("number")
    counted = _live(latents).group_by("dictionary", "place", number).agg(pl.len().alias("latents"))
    low, high = (pl.lit(10.0).pow((pl.col("number") + end) / per_decade) for end in (0, 1))
    ordered = counted.with_columns(low.alias("low"), high.alias("high")).sort("place", "low")
    return ordered.select("dictionary", "low", "high", "latents").collect()


def most_frequent(latents: pl.LazyFrame, count: int) -> pl.DataFrame:
    """The `count` most often active latents of each dictionary: dictionary, latent, frequency, mean_activation,
    max_activation, dense."""
    ordered = _live(latents).sort("place", "frequency", "latent", descending=[False, True, False]).select(_SHOWN)
    dense = (pl.col("frequency") > DENSE_FREQUENCY).alias("dense")
    return ordered.group_by("dictionary", maintain_order=True).head(count).with_columns(dense).collect()


def least_frequent(latents: pl.LazyFrame, count: int) -> pl.DataFrame:
    """The `count` least often active latents of each dictionary that are not dead; columns as `most_frequent`, but dense."""
    ordered = _live(latents).sort("place", "frequency", "latent").select(_SHOWN)
    return ordered.group_by("dictionary", maintain_order=True).head(count).collect()


def _live(latents: pl.LazyFrame) -> pl.LazyFrame:
    """Latents that are not dead, with `place`: that of their dictionary in the table, where its rows stand together."""
    return latents.with_columns(pl.col("dictionary").rle_id().alias("place")).filter(_LIVE)
