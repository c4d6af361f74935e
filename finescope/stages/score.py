"""`score`: every document's likeness to the seeds, from the stored codes alone, in two passes over them."""

from collections.abc import Iterator
from typing import Any

from finescope.config import CorpusSection, EmbedSection, ScoreSection
from finescope.config_seeds import SeedFile
from finescope.curation.codes import codes_of
from finescope.curation.ranking import Eligible, Ranking
from finescope.curation.score import Scorer
from finescope.curation.screen import recall_of
from finescope.curation.shards import ShardScorer
from finescope.manifest import TableFile
from finescope.runners.base import Context, Resources
from finescope.stages.references import read_shards
from finescope.stages.scoring import Background, num_latents_of, seed_codes, units_of
from finescope.steps import Outcome, StepInput

# The recall of a screen is told of the best 100, 200, 500, 1,000 and so on.
_LEAST_BEST, _STEPS = 100, (1, 2, 5)


def score(
    context: Context, corpus: CorpusSection, seeds: SeedFile, section: ScoreSection, embedded: EmbedSection, step: StepInput
) -> Outcome:
    """Score all embedded documents. Behind a screen they are weighed with its sample of the whole corpus, not with themselves.

    Raises:
        CorpusError: a seed is empty, or has no active latent.
    """
    num_latents = num_latents_of(step)
    texts, codes = seed_codes(context, corpus, seeds, embedded, step, "score")
    files, documents = step["embed"].files("embeddings"), step["embed"].tables["embeddings"].rows
    screened = step.inputs.get("screen")
    known = (files, documents) if screened is None else (screened.files("sampled"), screened.tables["sampled"].rows)
    background = Background(context, *known, step, section, "score")
    scorer = background.scorer(codes)
    written: list[dict[str, Any]] = []
    with context.reporter.task("score", documents, "documents") as progress:
        arguments = (scorer, num_latents, step.uri)
        for record in context.runner.map(ShardScorer, arguments, units_of(files), Resources(accelerator=False)):
            written.extend(record.to_pylist())
            progress(written[-1]["rows"])
    written.sort(key=lambda row: row["unit"])
    shards = tuple(TableFile(path=row["path"], rows=row["rows"], bytes=row["bytes"]) for row in written)
    rows = sum(shard.rows for shard in shards)
    facts: dict[str, Any] = {"seeds": texts, "seed_latents": [codes.row(index)[0][:8].tolist() for index in range(len(codes))]}
    if background.sample is not None:
        facts["background"] = len(background.sample)
    if screened is not None:
        ranking = Ranking.of([f"{step.uri}/{shard.path}" for shard in shards], Eligible())
        facts["screen"] = _recall_of_screen(context, scorer, ranking, num_latents, step)
    return Outcome(documents, rows, 0, {"scores": shards}, facts)


def _recall_of_screen(
    context: Context, scorer: Scorer, ranking: Ranking, num_latents: int, step: StepInput
) -> list[dict[str, float]]:
    """Of the best so many documents that passed the screen, how many like them it stopped, by the audit: a row a number."""
    screen = step["screen"]
    audited, stopped = int(screen.facts["audited"]), int(screen.facts["stopped"])
    scores = scorer(codes_of(read_shards(screen, "audited"), num_latents)).score if screen.files("audited") else None

    def row(documents: int) -> dict[str, float]:
        above = 0 if scores is None else int((scores >= ranking.lowest(documents)).sum())
        return {"documents": documents, "above": above, **recall_of(documents, above, audited, stopped)._asdict()}

    asked, best = screen.section["recall"], round(screen.section["top"] * screen.rows_out)
    found = row(max(1, min(best, ranking.size)))
    if found["at_most"] < asked:
        context.reporter.warn(
            f"score: of the best {found['documents']:,} documents {100 * found['recall']:.1f} % passed the screen (at most "
            f"{100 * found['at_most']:.1f} %), fewer than screen.recall asks for; raise it, or screen.sample or screen.share"
        )
    return [row(documents) for documents in _sizes(ranking.size)]


def _sizes(most: int) -> Iterator[int]:
    size = _LEAST_BEST
    while size * _STEPS[0] <= most:
        yield from (size * step for step in _STEPS if size * step <= most)
        size *= 10
    if most < _LEAST_BEST:
        yield most
