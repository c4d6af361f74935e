"""Charts as inline SVG: drawn when the report is written, so that the page needs no script and no network.

Axes and labels get their colours from the page's style sheet, as that knows light from dark; marks are chosen to be seen on both.
"""

import hashlib
import io
import math
import re
from typing import Any, Literal

import altair as alt
import polars as pl

KEPT, REST, CONTROL = "#2f7ed8", "#a3acb9", "#d9822b"
_SERIES = [KEPT, CONTROL, "#2f9e6f", "#9067c6", "#c94f7c", "#7a8594"]
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"


def histogram(bins: pl.DataFrame, cut: float | None) -> str:
    """Scored documents by score with the curated ones in front, and a line at the lowest score that was kept."""
    layers = pl.concat(
        [
            bins.select("low", "high", pl.col("scored").alias("documents"), set=pl.lit("scored")),
            bins.select("low", "high", pl.col("curated").alias("documents"), set=pl.lit("curated")),
        ]
    )
    # Few are kept of many: on a linear scale the kept ones of a large corpus could not be seen.
    scale = alt.Scale(type="sqrt")
    bars = (
        alt.Chart(layers.filter(pl.col("documents") > 0))
        .mark_bar(binSpacing=0.6)
        .encode(
            x=alt.X("low:Q", bin="binned", title="score", axis=alt.Axis(grid=False, tickCount=10)),
            x2="high",
            y=alt.Y("documents:Q", scale=scale, stack=None, title="documents (square-root scale)", axis=alt.Axis(tickCount=5)),
            color=_colours("set", ["scored", "curated"], [REST, KEPT]),
            order=alt.Order("set:N", sort="descending"),
        )
    )
    chart: Any = bars
    if cut is not None:
        at = pl.DataFrame({"cut": [cut], "label": [f"cut {cut:.3f}"]})
        line = alt.Chart(at).mark_rule(strokeDash=[4, 3], strokeWidth=1.5, color=CONTROL).encode(x="cut:Q")
        text = alt.Chart(at).mark_text(align="right", dx=-5, y=8, fontSize=12).encode(x="cut:Q", text="label:N")
        chart = alt.layer(bars, line, text)
    return _svg(chart.properties(width=820, height=200))


def lines(points: pl.DataFrame, title: str, along: str) -> str:
    """Curves over `along`, the title of the x axis (columns x, value, series); one series needs no legend."""
    series = points["series"].unique(maintain_order=True).to_list()
    legend = alt.Legend(title=None, orient="top", symbolType="stroke") if len(series) > 1 else None
    largest = points.select(pl.col("value").abs().max()).item() or 0.0
    numbers = ".1e" if largest < 1e-2 else "~g"
    chart = (
        alt.Chart(points)
        .mark_line(strokeWidth=1.8, clip=True)
        .encode(
            x=alt.X("x:Q", title=along, axis=alt.Axis(grid=False, tickCount=5, format="~s"), scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=5, format=numbers), scale=alt.Scale(zero=False)),
            color=alt.Color("series:N", legend=legend, scale=alt.Scale(domain=series, range=_SERIES)),
        )
    )
    return _svg(chart.properties(width=390, height=150, title=title))


def frequencies(bins: pl.DataFrame, lowest: float, dense: float, title: str) -> str:
    """Latents by the share of tokens on which they are active, logarithmic, from `lowest` to 1: columns low, high, latents.

    Those above `dense` are set apart.
    """
    least = min(lowest, dense)
    decades = [10.0**power for power in range(math.ceil(math.log10(least)), 1)]
    x = alt.X(
        "low:Q",
        title="share of the tokens on which a latent is active",
        scale=alt.Scale(type="log", domain=[least, 1.0]),
        axis=alt.Axis(grid=False, format="~g", values=decades),
    )
    chart = (
        alt.Chart(bins.with_columns(zero=pl.lit(0), dense=pl.col("low") >= dense))
        .mark_rect(strokeWidth=0)
        .encode(
            x=x,
            x2="high",
            y=alt.Y("latents:Q", title="latents", axis=alt.Axis(tickCount=4)),
            y2="zero",
            color=alt.condition("datum.dense", alt.value(CONTROL), alt.value(KEPT)),
        )
    )
    return _svg(chart.properties(width=390, height=150, title=title))


def importance_maps(maps: dict[str, pl.DataFrame]) -> str:
    """Layers x groups, one panel a kind of groups, by its title: columns layer, cell, importance, kept."""
    first, last = next(iter(maps)), next(reversed(maps))
    panels = [_importance_map(frame, title, title == first, title == last) for title, frame in maps.items()]
    return _svg(alt.hconcat(*panels, spacing=28))


def _importance_map(cells: pl.DataFrame, title: str, first: bool, legend: bool) -> Any:
    positive = [value for value in cells["importance"].to_list() if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    layers, wide = cells["layer"].n_unique(), cells["cell"].n_unique()
    x = alt.X("cell:O", title=None, axis=alt.Axis(labels=False, ticks=False, domain=False))
    y = alt.Y("layer:O", title="layer" if first else None, axis=alt.Axis(ticks=False, domain=False, labelOverlap=True))
    base = alt.Chart(cells.with_columns(pl.col("importance").clip(lower_bound=low)))
    panels = []
    schemes: dict[Literal["blues", "oranges"], bool] = {"blues": True, "oranges": False}
    for scheme, kept in schemes.items():
        name = "kept" if kept else "removed"
        bar = alt.Legend(
            title=f"importance, {title}, {name}",
            orient="bottom",
            gradientLength=180,
            titleLimit=260,
            gradientThickness=8,
            tickCount=3,
            format=".0e",
        )
        colour = alt.Color(
            "importance:Q",
            scale=alt.Scale(type="log", domain=[low, high], scheme=alt.SchemeParams(scheme, extent=[0.12, 1.0])),
            legend=bar if legend else None,
        )
        panels.append(base.transform_filter(f"datum.kept === {str(kept).lower()}").mark_rect().encode(x=x, y=y, color=colour))
    width = min(560, max(24 * wide, 100))
    layered = alt.layer(*panels).resolve_scale(color="independent")
    return layered.properties(width=width, height=max(10 * layers, 60), title=title)


def _colours(field: str, domain: list[str], colours: list[str]) -> alt.Color:
    return alt.Color(
        f"{field}:N",
        scale=alt.Scale(domain=domain, range=colours),
        legend=alt.Legend(title=None, orient="top", symbolType="square"),
    )


def _svg(chart: alt.Chart | alt.LayerChart | alt.HConcatChart) -> str:
    styled = (
        chart.configure(background="transparent", font=_FONT, padding=8)
        .configure_view(stroke=None)
        .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal", domainOpacity=0.6, tickOpacity=0.6)
        .configure_title(fontSize=12, fontWeight=600, anchor="start", offset=6)
        .configure_legend(labelFontSize=11, titleFontSize=11, titleFontWeight="normal")
    )
    out = io.StringIO()
    styled.save(out, format="svg")
    # Vega numbers its gradients and clips from nought in every chart, and they all end up in one page.
    drawn = out.getvalue()
    prefix = f"c{hashlib.sha256(drawn.encode()).hexdigest()[:8]}-"
    return re.sub(r'(\bid="|url\(#|href="#)', lambda found: found.group(1) + prefix, drawn)
