"""What a run's tables say, as small Polars frames. Pure: frames and manifests in, frames out; aggregated before collected."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from finescope.manifest import Manifest
from finescope.rounds import in_order

_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# The column by which a corpus says where a document came from.
SOURCE = "source"


def screen(step: Manifest) -> pl.DataFrame:
    """What the screen let through: documents, passed, share, stopped, sampled, audited (of those that it stopped)."""
    facts = {name: step.facts[name] for name in ("passed", "share", "stopped", "sampled", "audited")}
    return pl.DataFrame({"documents": step.rows_out, **facts})


def screen_by_domain(step: Manifest) -> pl.DataFrame:
    """What was expected of it from its sample: domain, best (documents of the sample), recall of these, share that passes."""
    kinds = {"domain": pl.String, "best": pl.Int64, "recall": pl.Float64, "share": pl.Float64}
    return pl.DataFrame(step.facts["domains"], schema_overrides=kinds).select(*kinds)


def screen_recall(step: Manifest) -> pl.DataFrame:
    """As `score` measured it on the audit, a row a number of best documents: documents, above (documents of the audit that score
    as high), recall, and the interval of 95 % at_least to at_most."""
    kinds = {"documents": pl.Int64, "above": pl.Int64, **dict.fromkeys(("recall", "at_least", "at_most"), pl.Float64)}
    return pl.DataFrame(step.facts["screen"], schema=kinds)


def score_quantiles(scores: pl.LazyFrame) -> pl.DataFrame:
    """The distribution of the scores, each one that occurs: quantile, score. Holds the column of scores, sorted once."""
    ordered = scores.select(pl.col("score").sort()).collect()["score"].drop_nulls()
    last = len(ordered) - 1
    values = [float(ordered[round(quantile * last)]) if last >= 0 else None for quantile in _QUANTILES]
    return pl.DataFrame({"quantile": _QUANTILES, "score": values}, schema={"quantile": pl.Float64, "score": pl.Float64})


def score_histogram(scores: pl.LazyFrame, curated: pl.LazyFrame, bins: int) -> pl.DataFrame:
    """Documents in `bins` equal intervals of the score: low, high, scored, curated. Empty where nothing was scored."""
    low, high = scores.select(pl.col("score").min().alias("low"), pl.col("score").max().alias("high")).collect().row(0)
    if low is None:
        return pl.DataFrame(schema={"low": pl.Float64, "high": pl.Float64, "scored": pl.UInt32, "curated": pl.UInt32})
    width = max(high - low, 1e-9) / bins
    edges = pl.DataFrame({"bin": range(bins)}, schema={"bin": pl.Int64})
    at = ((pl.col("score").cast(pl.Float64) - low) / width).floor().cast(pl.Int64).clip(0, bins - 1).alias("bin")
    for name, frame in (("scored", scores), ("curated", curated)):
        counted = frame.group_by(at).agg(pl.len().alias(name)).collect()
        edges = edges.join(counted, on="bin", how="left").with_columns(pl.col(name).fill_null(0))
    bounds = [(low + pl.col("bin") * width).alias("low"), (low + (pl.col("bin") + 1) * width).alias("high")]
    return edges.sort("bin").select(*bounds, "scored", "curated")


def near_misses(scores: pl.LazyFrame, curated: pl.LazyFrame, count: int) -> pl.DataFrame:
    """The `count` documents that were kept last and the `count` best below them: kept, and the columns of `NEAR`.

    A document above the last one kept that is not in the curated set was rejected by `curate`; `rejects` says why.
    """
    kept = curated.select("doc_id", "score").bottom_k(count, by=["score", "doc_id"], reverse=[False, True]).collect()
    if kept.is_empty():
        return pl.DataFrame(schema={"kept": pl.Boolean, **scores.select(NEAR).collect_schema()})
    kept = kept.sort(["score", "doc_id"], descending=[True, False])
    score, doc_id = kept["score"][-1], kept["doc_id"][-1]
    below = (pl.col("score") < score) | ((pl.col("score") == score) & (pl.col("doc_id") > doc_id))
    # The scores alone say how far down to look; the other columns are then read for a handful of rows.
    lowest = scores.filter(pl.col("score") < score).select("score").top_k(count, by="score").min().collect().item()
    near = scores.filter(pl.col("score").is_between(score if lowest is None else lowest, kept["score"][0])).select(NEAR)
    rest = near.filter(below).bottom_k(count, by=["score", "doc_id"], reverse=[True, False]).collect()
    last = near.filter(pl.col("doc_id").is_in(kept["doc_id"].to_list())).collect()
    both = pl.concat([last.with_columns(kept=pl.lit(True)), rest.with_columns(kept=pl.lit(False))])
    return both.sort(["score", "doc_id"], descending=[True, False]).select("kept", *NEAR)


NEAR = ("doc_id", "score", "seed", "top_latents", "file", "row_group", "row")


def sources(curated: pl.LazyFrame, corpus: Mapping[str, int]) -> pl.DataFrame:
    """Documents by the curated table's `source` column: source, documents, share, and corpus, corpus_share, where known.

    Args:
        corpus: documents of the whole corpus by source; empty where that is not known.

    Returns:
        The largest share first; without rows where the corpus has no such column.
    """
    counts = {"source": pl.String, "documents": pl.UInt32, "corpus": pl.Int64}
    if SOURCE not in curated.collect_schema():
        return _with_shares(pl.DataFrame(schema=counts))
    named = pl.col(SOURCE).cast(pl.String).fill_null("(none)").alias("source")
    found = curated.group_by(named).agg(pl.len().alias("documents")).collect()
    known = pl.DataFrame(
        {"source": list(corpus), "corpus": list(corpus.values())}, schema={k: counts[k] for k in ("source", "corpus")}
    )
    joined = found.join(known, on="source", how="full", coalesce=True).with_columns(pl.col("documents").fill_null(0))
    return _with_shares(joined).sort(["share", "corpus", "source"], descending=[True, True, False], nulls_last=True)


def _with_shares(counts: pl.DataFrame) -> pl.DataFrame:
    share = pl.col("documents") / pl.col("documents").sum()
    corpus_share = pl.when(pl.col("corpus").count() > 0).then(pl.col("corpus") / pl.col("corpus").sum())
    return counts.select("source", "documents", share.alias("share"), "corpus", corpus_share.alias("corpus_share"))


def seed_hits(curated: pl.LazyFrame, seeds: list[str]) -> pl.DataFrame:
    """Curated documents by their nearest seed: seed, documents, best, mean (scores), text. All seeds, in their order."""
    asked = pl.DataFrame({"seed": range(len(seeds)), "text": seeds}, schema={"seed": pl.Int32, "text": pl.String})
    score = pl.col("score")
    found = curated.group_by("seed").agg(pl.len().alias("documents"), score.max().alias("best"), score.mean().alias("mean"))
    joined = asked.join(found.collect(), on="seed", how="left").with_columns(pl.col("documents").fill_null(0))
    return joined.sort("seed").select("seed", "documents", "best", "mean", "text")


def scores_of(scores: pl.LazyFrame, curated: pl.LazyFrame) -> pl.LazyFrame:
    """The rows of `scores` that were curated. Ids are looked at above the lowest curated score alone."""
    lowest = curated.select(pl.col("score").min()).collect().item()
    above = scores.filter(pl.col("score") >= (0.0 if lowest is None else lowest))
    return above.join(curated.select("doc_id"), on="doc_id", how="semi")


def top_latents(scores: pl.LazyFrame, curated: pl.LazyFrame, background: pl.LazyFrame, count: int) -> pl.DataFrame:
    """Latents that set the curated documents apart: those that are among the reasons of their scores.

    Args:
        background: scores of any documents, or of a sample of them.

    Returns:
        latent, documents (curated, among whose reasons it is), share (of the curated set), background_share and lift, their
        ratio. By share * log(lift), what the latent adds to the Kullback-Leibler divergence. A latent that the background
        lacks counts there as half a document.
    """
    documents, sampled = (frame.select(pl.len()).collect().item() for frame in (curated, background))
    counted = _reasons(scores_of(scores, curated), "documents").join(_reasons(background, "seen"), on="latent", how="left")
    background_share = pl.col("seen").fill_null(0) / max(sampled, 1)
    lift = pl.col("share") / pl.max_horizontal("background_share", pl.lit(0.5 / max(sampled, 1)))
    shares = counted.with_columns((pl.col("documents") / max(documents, 1)).alias("share"), background_share=background_share)
    ordered = shares.with_columns(lift=lift).sort(pl.col("share") * pl.col("lift").log(), "latent", descending=[True, False])
    return ordered.select("latent", "documents", "share", "background_share", "lift").head(count).collect()


def _reasons(scores: pl.LazyFrame, name: str) -> pl.LazyFrame:
    reasons = scores.select(pl.col("top_latents").alias("latent")).explode("latent").drop_nulls()
    return reasons.group_by("latent").agg(pl.len().alias(name))


def rejects_by_reason(rejects: pl.LazyFrame) -> pl.DataFrame:
    """Rejects by step and reason: step, reason, rows, example (the detail of the first). Most rows first."""
    grouped = rejects.group_by("step", "reason").agg(
        pl.len().alias("rows"), pl.col("detail").drop_nulls().first().alias("example")
    )
    return grouped.collect().sort(["rows", "step", "reason"], descending=[True, False, False])


def curves(metrics: pl.LazyFrame, names: list[str], first: str | None = None) -> pl.DataFrame:
    """Training curves: name, point (1-based), value.

    A point is the order in which a metric was recorded, or with `first` the number of the record it is of: records stand one
    after the other, begin with the metric `first`, and need not have the others.
    """
    kept = metrics.filter(pl.col("name").is_in(names)).select("name", "value").collect()
    of_name = pl.int_range(pl.len()).over("name") + 1
    point = of_name if first is None else (pl.col("name") == first).cum_sum().cast(pl.Int64)
    return kept.select("name", point.alias("point"), "value")


def last_metrics(metrics: pl.LazyFrame) -> pl.DataFrame:
    """Each metric's course in one row: step, name, points, first, last."""
    value = pl.col("value")
    columns = [pl.len().alias("points"), value.first().alias("first"), value.last().alias("last")]
    return metrics.group_by("step", "name", maintain_order=True).agg(columns).collect()


def rewrites_by_reason(rewrites: pl.LazyFrame) -> pl.DataFrame:
    """What the student was trained on, rewrite or original, and why: used, reason, documents, share."""
    counted = rewrites.group_by("used", pl.col("reason").fill_null("")).agg(pl.len().alias("documents")).collect()
    shares = counted.with_columns((pl.col("documents") / pl.col("documents").sum()).alias("share"))
    return shares.sort(["documents", "used", "reason"], descending=[True, False, False])


def wall_time(manifests: Mapping[str, Manifest]) -> pl.DataFrame:
    """Time by step, in the order of the pipeline: step, seconds, share, rows_in, rows_out, rejects."""
    rows: list[dict[str, Any]] = [
        {"step": name, "seconds": m.seconds, "rows_in": m.rows_in, "rows_out": m.rows_out, "rejects": m.rejects}
        for name in in_order(manifests)
        for m in (manifests[name],)
    ]
    integers = dict.fromkeys(("rows_in", "rows_out", "rejects"), pl.Int64)
    frame = pl.DataFrame(rows, schema={"step": pl.String, "seconds": pl.Float64, **integers})
    share = (pl.col("seconds") / pl.col("seconds").sum()).alias("share")
    return frame.select("step", "seconds", share, *integers)
