"""The HTML report of a run: one file, no script, nothing loaded from anywhere. A step that is not done has no section."""

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import polars as pl
import yaml
from markupsafe import Markup

from finescope import storage
from finescope.analysis import charts, origins, summaries
from finescope.analysis.curves import curve_charts
from finescope.analysis.digest import BACKGROUND
from finescope.analysis.frames import frame_of, frames_of, sample_of
from finescope.analysis.pruning_section import pruning_section
from finescope.analysis.sae_section import sae_section
from finescope.analysis.table import closing_grid, shown
from finescope.manifest import Manifest, now
from finescope.rounds import in_order, kind_of

REPORT = "report.html"
_EXAMPLES = 8
_SOURCES = 40
_TEXT_CHARACTERS = 900
_CUT_CHARACTERS = 160
_REWRITES = 3
_DISTILL_CURVES = {
    "loss": "loss",
    "held_out_loss": "loss on held-out examples",
    "divergence": "divergence from the teacher",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens a second",
}


@dataclass(frozen=True)
class _Run:
    """The manifests of a run, and shorthands for what is done of it."""

    manifests: Mapping[str, Manifest]

    def has(self, step: str, table: str) -> bool:
        return step in self.manifests and table in self.manifests[step].tables

    def frame(self, step: str, table: str) -> pl.LazyFrame:
        return frame_of(self.manifests[step], table)

    def facts(self, step: str) -> dict[str, Any]:
        return self.manifests[step].facts if step in self.manifests else {}


def write_report(output: str, manifests: Mapping[str, Manifest], to_uri: str) -> None:
    """Write the report of the run at `output` to the file `to_uri`."""
    storage.put_bytes(to_uri, render(output, manifests).encode())


def render(output: str, manifests: Mapping[str, Manifest]) -> str:
    """The report as HTML. All text of the corpus is escaped; only the charts are inserted as they are."""
    run = _Run({name: manifests[name] for name in in_order(manifests) if name != "report"})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": _count, "percent": _percent, "seconds": _seconds}
    source = importlib.resources.files("finescope.analysis").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        name=output.rstrip("/").rsplit("/", 1)[-1],
        output=output,
        written=now()[:16].replace("T", " "),
        model=run.facts("model").get("source", ""),
        tiles=_tiles(run),
        grid=closing_grid(manifests),
        target_source=run.facts("evaluate").get("target_source"),
        speed=run.facts("evaluate").get("speed"),
        scores=_scores(run),
        curated=_curated(run),
        sae=sae_section(run.manifests["sae"]) if "sae" in run.manifests else None,
        pruned=pruning_section(run.manifests["prune"], _rounds(run)) if run.has("prune", "importance") else None,
        distilled=_distilled(run),
        rewrites=_rewrites(run),
        rejects=summaries.rejects_by_reason(frames_of(run.manifests, "rejects")).to_dicts(),
        times=summaries.wall_time(run.manifests).to_dicts(),
        steps=_steps(run),
        versions=next((m.versions for m in reversed([*run.manifests.values()])), {}),
        machines=sorted({m.machine for m in run.manifests.values()}),
    )


def _tiles(run: _Run) -> list[dict[str, str]]:
    """The run in four figures: label, value, note."""
    grid, tiles = closing_grid(run.manifests), []
    before, after = grid.value("parameters", "base"), grid.value("parameters", "recovered")
    if before and after:
        note = f"{shown(before, 'count')} to {shown(after, 'count')}"
        tiles.append({"label": "parameters removed", "value": _percent(1 - after / before), "note": note})
    perplexity = {model: grid.value("perplexity, target", model) for model in grid.columns}
    if (base := perplexity.get("base")) and (recovered := perplexity.get("recovered")):
        note = f"{shown(base, 'perplexity')} base, {shown(perplexity.get('pruned'), 'perplexity')} pruned"
        tiles.append({"label": "target perplexity, recovered", "value": shown(recovered, "perplexity"), "note": note})
    if "curate" in run.manifests:
        kept, scored = run.manifests["curate"].rows_out, run.facts("curate").get("scored", 0)
        tiles.append({"label": "documents curated", "value": f"{kept:,}", "note": f"of {scored:,} scored"})
    if run.manifests:
        total = sum(m.seconds for m in run.manifests.values())
        slowest = max(run.manifests.values(), key=lambda m: m.seconds)
        tiles.append({"label": "wall time", "value": _seconds(total), "note": f"most of it in {slowest.step}"})
    return tiles


def _scores(run: _Run) -> dict[str, Any] | None:
    if not (run.has("score", "scores") and run.has("curate", "curated")):
        return None
    scores, curated = run.frame("score", "scores"), run.frame("curate", "curated")
    cut = run.facts("curate").get("lowest_score")
    near = summaries.near_misses(scores, curated, 4)
    texts = [_cut(text or "", _CUT_CHARACTERS) for text in origins.texts(run.manifests, near)]
    return {
        "cut": cut,
        "scored": run.manifests["score"].tables["scores"].rows,
        "rejected": run.manifests["curate"].rejects,
        "chart": Markup(charts.histogram(summaries.score_histogram(scores, curated, 60), cut)),
        "quantiles": summaries.score_quantiles(scores).to_dicts(),
        "near": near.with_columns(text=pl.Series(texts, dtype=pl.String)).to_dicts(),
        "screen": _screen(run),
    }


def _screen(run: _Run) -> dict[str, Any] | None:
    """What passed the screen, and its recall of as many of the best as were curated, or the next more that it was measured of."""
    if "screen" not in run.manifests:
        return None
    measured = run.facts("score").get("screen", [])
    enough = [row for row in measured if row["documents"] >= run.manifests["curate"].rows_out]
    return {**run.facts("screen"), "best": (enough or measured[-1:] or [None])[0]}


def _curated(run: _Run) -> dict[str, Any] | None:
    if not run.has("curate", "curated"):
        return None
    curated, seeds = run.frame("curate", "curated"), run.facts("score").get("seeds", [])
    found: dict[str, Any] = {
        "documents": run.manifests["curate"].rows_out,
        "sources": origins.shares(run.manifests).head(_SOURCES).to_dicts(),
        "seeds": summaries.seed_hits(curated, seeds).to_dicts(),
        "latents": [],
        "examples": _examples(run, curated, seeds),
    }
    if run.has("score", "scores"):
        background = sample_of(run.manifests["score"], "scores", **BACKGROUND)
        found["latents"] = summaries.top_latents(run.frame("score", "scores"), curated, background, 12).to_dicts()
    return found


def _examples(run: _Run, curated: pl.LazyFrame, seeds: list[str]) -> list[dict[str, Any]]:
    """Curated documents from the best to the last one kept, evenly spaced in rank."""
    total = run.manifests["curate"].tables["curated"].rows
    ranks = sorted({1 + round(at * (total - 1) / max(_EXAMPLES - 1, 1)) for at in range(_EXAMPLES)})
    columns = ["rank", "doc_id", "score", "seed", "text"]
    columns += [summaries.SOURCE] if summaries.SOURCE in curated.collect_schema() else []
    rows = curated.filter(pl.col("rank").is_in(ranks)).select(columns)
    if run.has("score", "scores"):
        rows = rows.join(run.frame("score", "scores").select("doc_id", "top_latents"), on="doc_id", how="left")
    seed_latents = run.facts("score").get("seed_latents", [])
    examples = []
    for row in rows.collect().sort("rank").to_dicts():
        seed = row["seed"]
        of_seed = set(seed_latents[seed]) if seed < len(seed_latents) else set()
        latents = [{"id": latent, "of_seed": latent in of_seed} for latent in row.get("top_latents") or []]
        seed_text = _cut(seeds[seed], 300) if seed < len(seeds) else ""
        examples.append(row | {"text": _cut(row["text"], _TEXT_CHARACTERS), "seed_text": seed_text, "latents": latents})
    return examples


def _distilled(run: _Run) -> dict[str, Any] | None:
    if "distill" not in run.manifests:
        return None
    facts = {name: value for name, value in run.facts("distill").items() if isinstance(value, int | float | str)}
    labels = {"metrics": "recovered", "control_metrics": "control"}
    series = {label: run.frame("distill", table) for table, label in labels.items() if run.has("distill", table)}
    return {"facts": facts, "charts": curve_charts(series, _DISTILL_CURVES, first="loss")}


def _rounds(run: _Run) -> list[dict[str, Any]]:
    """What each round of pruning took, of the model that it was given and of the base; empty where there was one."""
    numbered = [name for name in run.manifests if kind_of(name) == "prune"]
    rounds = [run.facts(name) for name in numbered]
    return [
        {
            "step": name,
            "parameters": facts["parameters_after"],
            "of_input": facts.get("of_input", facts)["ratio_reached"],
            "of_base": facts["ratio_reached"],
        }
        for name, facts in zip(numbered, rounds, strict=True)
        if len(rounds) > 1
    ]


def _rewrites(run: _Run) -> dict[str, Any] | None:
    if not run.has("teach", "rewrites"):
        return None
    rewrites = run.frame("teach", "rewrites")
    chosen = rewrites.filter(pl.col("used") == "rewrite").head(_REWRITES).collect()
    texts = ("prompt", "response_original", "response")
    pairs = [row | {name: _cut(row[name] or "", _TEXT_CHARACTERS) for name in texts} for row in chosen.to_dicts()]
    return {"reasons": summaries.rewrites_by_reason(rewrites).to_dicts(), "pairs": pairs}


def _steps(run: _Run) -> list[dict[str, Any]]:
    """What each done step was asked for and is known by."""
    return [
        {
            "step": name,
            "identity": manifest.identity,
            "version": manifest.version,
            "started": manifest.started[:19].replace("T", " "),
            "section": yaml.safe_dump(manifest.section, sort_keys=False, allow_unicode=True).strip(),
        }
        for name, manifest in run.manifests.items()
    ]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rstrip() + " ..."


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else f"{value // 60:.0f} min {value % 60:.0f} s"
