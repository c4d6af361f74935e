"""The report's section on the sparse autoencoders of a run."""

import math
from collections.abc import Callable
from typing import Any

import polars as pl
from markupsafe import Markup

from finescope.analysis import charts, latents
from finescope.analysis.curves import curve_charts
from finescope.analysis.frames import frame_of
from finescope.manifest import Manifest
from finescope.sae.naming import DENSE_FREQUENCY, SHARED_COSINE, dictionary_of

_CURVES = {
    "fvu": "fraction of variance unexplained",
    "dead_share": "share of dead latents",
    "loss": "loss",
    "l0": "active latents a token",
}
_FACTS = ("path", "layer", "site", "architecture", "num_latents", "k", "tokens", "held_out_tokens", "fvu_recorded")
# Of a run without the table of latents, these are all that is known; of any other, the table of metrics has them.
_MEASURED_FACTS = ("fvu", "dead_share", "l0")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# Of each metric the row's label and how its value is written.
_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "fvu": ("fraction of variance unexplained", "{:.4f}".format),
    "l0": ("active latents a token (L0)", "{:.1f}".format),
    "dead_share": ("dead latents: active on no token of the set", _percent),
    "dense_share": (f"dense latents: active on more than {100 * DENSE_FREQUENCY:.0f} % of the tokens", _percent),
    "ce_base": ("cross-entropy of the model, nats a token", "{:.3f}".format),
    "ce_spliced": ("cross-entropy with the reconstruction spliced in", "{:.3f}".format),
    "ce_zeroed": ("cross-entropy with zeros spliced in", "{:.3f}".format),
    "ce_recovered": ("cross-entropy recovered: (zeros - reconstruction) / (zeros - model)", _percent),
    "stability": ("stability: mean of the largest cosine to another seed's latents", "{:.3f}".format),
    "stable_share": (f"latents that another seed found as well: largest cosine above {SHARED_COSINE}", _percent),
}
_BINS_PER_DECADE = 4


def sae_section(manifest: Manifest) -> dict[str, Any]:
    """What the template needs: facts, metrics (dictionaries, rows of label and cells), frequencies and charts (drawings).

    A run of before there was a table `latents` has neither metrics nor frequencies; a dictionary that was given, not trained,
    has no curves.
    """
    measured = "latents" in manifest.tables
    names = _FACTS if measured else (*_FACTS, *_MEASURED_FACTS)
    shown = {name: manifest.facts[name] for name in names if manifest.facts.get(name) is not None}
    shown["coordinates"] = len(manifest.facts.get("coordinates", ()))
    metrics = frame_of(manifest, "metrics") if "metrics" in manifest.tables else None
    section: dict[str, Any] = {"facts": shown, "charts": [], "metrics": None, "frequencies": []}
    if metrics is not None:
        section["charts"] = curve_charts(_by_dictionary(metrics), _CURVES, manifest.facts.get("history_steps", ()))
    if measured:
        table = frame_of(manifest, "latents")
        found = latents.dictionaries(table)
        section["frequencies"] = _frequency_charts(table, found)
        if metrics is not None:
            section["metrics"] = _metrics(metrics, found["dictionary"].to_list())
    return section


def _by_dictionary(metrics: pl.LazyFrame) -> dict[str, pl.LazyFrame]:
    """The rows of each dictionary under the metrics' own names; dictionaries in the order of the table."""
    own: dict[str, dict[str, str]] = {}
    for name in metrics.select(pl.col("name").unique(maintain_order=True)).collect()["name"]:
        dictionary, metric = dictionary_of(name)
        own.setdefault(dictionary, {})[name] = metric
    name = pl.col("name")
    return {
        dictionary: metrics.filter(name.is_in(list(of))).with_columns(name.replace_strict(of, return_dtype=pl.String))
        for dictionary, of in own.items()
    }


def _metrics(metrics: pl.LazyFrame, dictionaries: list[str]) -> dict[str, Any]:
    """The last value of each metric: what was measured over the whole set is written after the curves."""
    last: dict[str, dict[str, float]] = {}
    for dictionary, rows in _by_dictionary(metrics).items():
        values = rows.group_by("name", maintain_order=True).agg(pl.col("value").last()).collect()
        last[dictionary] = dict(values.iter_rows())
    rows = []
    for name, (label, written) in _METRICS.items():
        values = [last.get(dictionary, {}).get(name, math.nan) for dictionary in dictionaries]
        if not all(map(math.isnan, values)):
            rows.append({"label": label, "cells": ["-" if math.isnan(value) else written(value) for value in values]})
    return {"dictionaries": dictionaries, "rows": rows}


def _frequency_charts(table: pl.LazyFrame, dictionaries: pl.DataFrame) -> list[Markup]:
    """A histogram a dictionary, all over the same range of frequencies."""
    bins = latents.frequency_histogram(table, _BINS_PER_DECADE)
    lowest = min(bins["low"], default=DENSE_FREQUENCY)
    drawn = []
    for row in dictionaries.iter_rows(named=True):
        title = f"{row['dictionary']}: {row['latents']:,} latents, {row['dead']:,} dead, {row['dense']:,} dense"
        own = bins.filter(pl.col("dictionary") == row["dictionary"])
        drawn.append(Markup(charts.frequencies(own, lowest, DENSE_FREQUENCY, title)))
    return drawn
