"""Charts of what was recorded while something was trained."""

from collections.abc import Mapping, Sequence

import polars as pl
from markupsafe import Markup

from finescope.analysis import charts, summaries


def curve_charts(
    series: Mapping[str, pl.LazyFrame], titles: Mapping[str, str], steps: Sequence[int] = (), first: str | None = None
) -> list[Markup]:
    """A chart a metric of `titles` that was recorded more than once, with a curve of each series.

    Args:
        series: by label, frames of `schemas.METRICS`.
        titles: of the charts, by the metric's name.
        steps: the training steps at which each metric was recorded; values after as many are of something else, measured at
            the end. Empty: at every step. (`metrics` has no column for the training step.)
        first: the metric that the record of each training step begins with, where some have metrics that others do not.
    """
    found = [
        summaries.curves(frame, list(titles), first).with_columns(series=pl.lit(label, dtype=pl.String))
        for label, frame in series.items()
    ]
    points = pl.concat(found) if found else pl.DataFrame(schema={"name": pl.String, "point": pl.Int64})
    if steps:
        points = points.filter(pl.col("point") <= len(steps))
    at = pl.col("point").replace(dict(enumerate(steps, start=1))).alias("x")
    return [
        Markup(charts.lines(points.filter(pl.col("name") == name).select(at, "value", "series"), title, "training step"))
        for name, title in titles.items()
        if points.filter(pl.col("name") == name).height > len(found)
    ]
