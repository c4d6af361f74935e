"""What `finescope inspect` shows of each table of a run: the summaries that are worth seeing first."""

from collections.abc import Callable, Mapping

import polars as pl

from finescope.analysis import latents, origins, pruning, summaries
from finescope.analysis.frames import frames_of, sample_of
from finescope.manifest import Manifest
from finescope.rounds import kind_of, round_of

Summaries = dict[str, pl.DataFrame]
_NEAR = 5
_LATENTS = 12
_SOURCES = 20
# Scored documents that stand for the corpus: rows of each of so many shards.
BACKGROUND = {"files": 8, "rows": 5_000}


def digest(manifests: Mapping[str, Manifest], table: str | None = None) -> Summaries:
    """Summaries by title: of one table, or of all that the run has. A table that nothing is summarised of gives none.

    What earlier rounds of pruning and training wrote stands apart, with the round in the title.
    """
    last = {step: manifest for step, manifest in manifests.items() if round_of(step) is None}
    found = _summaries(last, table)
    for number in sorted({number for step in manifests if (number := round_of(step)) is not None}):
        own = {kind_of(step): manifest for step, manifest in manifests.items() if round_of(step) == number}
        found |= {f"{title} (round {number})": frame for title, frame in _summaries(own, table).items()}
    return found


def _summaries(manifests: Mapping[str, Manifest], table: str | None) -> Summaries:
    there = {name for manifest in manifests.values() for name in manifest.tables}
    wanted = [name for name in _OF_TABLE if name in there and table in (None, name)]
    return {title: frame for name in wanted for title, frame in _OF_TABLE[name](manifests).items()}


def _screened(manifests: Mapping[str, Manifest]) -> Summaries:
    return {"screen": summaries.screen(manifests["screen"]), "screen by domain": summaries.screen_by_domain(manifests["screen"])}


def _scores(manifests: Mapping[str, Manifest]) -> Summaries:
    scores, curated = frames_of(manifests, "scores"), frames_of(manifests, "curated")
    found = {"score quantiles": summaries.score_quantiles(scores)}
    if "score" in manifests and "screen" in manifests["score"].facts:
        found["recall of the screen"] = summaries.screen_recall(manifests["score"])
    if "curate" in manifests:
        near = summaries.near_misses(scores, curated, _NEAR)
        texts = pl.Series("text", origins.texts(manifests, near), pl.String)
        found["around the cut"] = near.drop("file", "row_group", "row").with_columns(texts)
        background = sample_of(manifests["score"], "scores", **BACKGROUND)
        found["top latents"] = summaries.top_latents(scores, curated, background, _LATENTS)
    return found


def _curated(manifests: Mapping[str, Manifest]) -> Summaries:
    by_source = origins.shares(manifests)
    seeds = manifests["score"].facts.get("seeds", []) if "score" in manifests else []
    found = {} if by_source.is_empty() else {"sources": by_source.head(_SOURCES)}
    return found | {"seeds": summaries.seed_hits(frames_of(manifests, "curated"), seeds)}


def _latents(manifests: Mapping[str, Manifest]) -> Summaries:
    table = frames_of(manifests, "latents")
    return {
        "dictionaries": latents.dictionaries(table),
        "latents by frequency": latents.frequency_histogram(table, 1),
        "most frequent latents": latents.most_frequent(table, _NEAR),
        "least frequent live latents": latents.least_frequent(table, _NEAR),
    }


def _importance(manifests: Mapping[str, Manifest]) -> Summaries:
    return {"pruned groups": pruning.pruned_groups(frames_of(manifests, "importance"))}


def _head_latents(manifests: Mapping[str, Manifest]) -> Summaries:
    return {"latents of heads": pruning.head_latents(frames_of(manifests, "head_latents"), _NEAR)}


def _rejects(manifests: Mapping[str, Manifest]) -> Summaries:
    return {"rejects": summaries.rejects_by_reason(frames_of(manifests, "rejects"))}


def _rewrites(manifests: Mapping[str, Manifest]) -> Summaries:
    return {"rewrites": summaries.rewrites_by_reason(frames_of(manifests, "rewrites"))}


def _metrics(manifests: Mapping[str, Manifest]) -> Summaries:
    return {"metrics": summaries.last_metrics(frames_of(manifests, "metrics"))}


_OF_TABLE: dict[str, Callable[[Mapping[str, Manifest]], Summaries]] = {
    "latents": _latents,
    "screened": _screened,
    "scores": _scores,
    "curated": _curated,
    "importance": _importance,
    "head_latents": _head_latents,
    "rewrites": _rewrites,
    "metrics": _metrics,
    "rejects": _rejects,
}
