"""`screen`: which documents are worth embedding, by a linear model of their n-grams that a sample's scores were fitted to.

A sample of the corpus is embedded and scored as `embed` and `score` would do it; the model is fitted; all documents are read
once, by workers that know text alone, and held against it; an audit of what it stopped is embedded all the same, of which
`score` measures how many of the best were lost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from finescope import storage
from finescope.config import CorpusSection, EmbedSection, ScoreSection
from finescope.config_screen import ScreenSection
from finescope.config_seeds import SeedFile
from finescope.curation.codes import Codes, codes_of
from finescope.curation.ngrams import BUCKETS, hashed_ngrams
from finescope.curation.screen import Screen, cut_of, foretell
from finescope.errors import StepFailed
from finescope.models.load import ModelReference
from finescope.runners.base import Context, Resources
from finescope.stages.embed import Unit, embedded_units
from finescope.stages.references import limited_units, model_of
from finescope.stages.scoring import Background, num_latents_of, seed_codes
from finescope.stages.screen_units import NgramsOfSample, ScreenUnit
from finescope.stages.units import Record, below, check_rate, map_units, rejected, shard_of, shards, total
from finescope.steps import Outcome, StepInput

# Directories of the two samples, each with a table `embeddings`, and the fitted model, below the step's directory.
_SAMPLE, _AUDIT, _MODEL = "sample", "audit", "screen.safetensors"
# Of a text about as much is read as `embed` reads of it: characters a token, in English.
_CHARACTERS_PER_TOKEN = 5
# A screen that lets through a larger share is hardly worth its pass.
_LARGE_SHARE = 0.5


@dataclass(frozen=True)
class Screening:
    """The sections that the step is made of."""

    corpus: CorpusSection
    seeds: tuple[SeedFile, ...]
    screen: ScreenSection
    score: ScoreSection
    embed: EmbedSection


def screen(context: Context, recipe: Screening, step: StepInput) -> Outcome:
    """Hold every document against the screen; it passes if it may be among the best of any of the domains.

    Raises:
        CorpusError: a file is gone or has changed since `index`; a seed is empty.
        StepFailed: none of the sample is a document, none passes, or more than `max_reject_rate` of the rows are rejected.
    """
    corpus = recipe.corpus
    units = [unit for unit in limited_units(step["index"], corpus.limit) if unit["take"] > 0]
    in_sample, in_audit = draw(units, recipe.screen)
    sample = _embedded(context, recipe, step, in_sample, _SAMPLE, 1.0)
    fitted = storage.join(step.uri, _MODEL)
    if not storage.exists(fitted):
        storage.put_bytes(fitted, _fit(context, recipe, step, in_sample, sample))
    model, facts = Screen.from_bytes(storage.read_bytes(fitted))
    arguments = (model, corpus, _of_messages(corpus, step), step.uri)
    rows = sum(unit["take"] for unit in units)
    records = map_units(context, "screen", ScreenUnit, arguments, units, Resources(accelerator=False), step.uri, rows)
    check_rate(records, corpus.max_reject_rate)
    rows, passed = total(records, "rows"), total(records, "passed")
    if not passed:
        raise StepFailed("no document passes the screen: raise screen.share or screen.recall")
    audit = _embedded(context, recipe, step, _stopped(in_audit, records, step), _AUDIT, 1 - passed / rows)
    facts |= {"passed": passed, "stopped": rows - passed, "share": passed / rows}
    facts |= {"sampled": total(sample, "rows"), "audited": total(audit, "rows_in")}
    if recipe.screen.share is None and facts["share"] > _LARGE_SHARE:
        context.reporter.warn(
            f"screen: {100 * facts['share']:.0f} % of the documents pass, so that little is saved: screen.recall takes so many, "
            "as their words say little of their scores, or as the corpus is small; screen.share would set the share"
        )
    tables = {
        "screened": shards(records, "screened"),
        "sampled": below(_SAMPLE, shards(sample, "embeddings")),
        "audited": below(_AUDIT, shards(audit, "embeddings")),
        "rejects": rejected(records),
    }
    return Outcome(total(records, "rows_in"), rows, total(records, "rejects"), tables, facts)


def draw(units: Sequence[Unit], section: ScreenSection) -> tuple[list[Unit], list[Unit]]:
    """Rows for the sample and for the audit, uniformly from all rows without replacement, as units that hold some, with `rows`.

    They have none in common, so that the audit judges the model by documents that it has not seen. Where there are not as many
    rows as both ask for, the audit is of all of them: then it is no estimate.
    """
    ends = np.cumsum([unit["take"] for unit in units])
    rows = int(ends[-1]) if len(ends) else 0
    asked = min(section.sample + section.audit, rows)
    numbers = np.random.default_rng(section.seed).choice(rows, asked, replace=False)
    audit = np.arange(rows) if asked == rows else numbers[section.sample :]

    def placed(drawn: np.ndarray) -> list[Unit]:
        drawn = np.sort(drawn)
        owner = np.searchsorted(ends, drawn, side="right")
        within = drawn - (ends - [unit["take"] for unit in units])[owner]
        return [units[number] | {"rows": within[owner == number].tolist()} for number in np.unique(owner)]

    return placed(numbers[: section.sample]), placed(audit)


def _embedded(
    context: Context, recipe: Screening, step: StepInput, units: Sequence[Unit], name: str, share: float
) -> list[Record]:
    """Embed what was drawn, of which about a `share` is."""
    uri, documents = storage.join(step.uri, name), round(share * sum(len(unit["rows"]) for unit in units))
    return embedded_units(context, f"screen: {name}", recipe.corpus, recipe.embed, step, units, uri, documents)


def _fit(context: Context, recipe: Screening, step: StepInput, units: Sequence[Unit], sample: Sequence[Record]) -> bytes:
    """The fitted model as a file, with what is known of each domain."""
    section, characters = recipe.screen, _CHARACTERS_PER_TOKEN * recipe.embed.max_tokens
    place = storage.join(step.uri, _SAMPLE)
    work = [unit | {"sampled": storage.join(place, shard_of("embeddings", unit["unit"]))} for unit in units]
    files = [unit["sampled"] for unit in work]
    documents = total(sample, "rows")
    if not documents:
        raise StepFailed(f"none of the {sum(len(unit['rows']) for unit in units):,} rows of the sample is a document")
    num_latents = num_latents_of(step)
    background = Background(context, files, documents, step, recipe.score, "screen")
    codes = Codes.concatenated([codes_of(storage.read_parquet(file), num_latents) for file in files])
    grams = _ngrams(context, recipe.corpus, step, work, characters)
    weights, bias, cuts, domains = [], [], [], []
    for seeds in recipe.seeds:
        texts, of_seeds = seed_codes(context, recipe.corpus, seeds, recipe.embed, step, "screen")
        scorer = background.scorer(of_seeds)
        scores = scorer(codes).score
        found = foretell(grams, scores, hashed_ngrams(texts, characters), scorer(of_seeds).score, section.seed)
        cut = cut_of(found.scores, scores, section)
        weights.append(found.weights.astype(np.float32))
        bias.append(found.bias)
        cuts.append(cut.value)
        expected = {"domain": seeds.domain, "share": cut.share, "recall": cut.recall, "best": cut.best}
        domains.append({**expected, "cut": cut.value if math.isfinite(cut.value) else None})
    model = Screen(np.stack(weights), np.array(bias), np.array(cuts), characters)
    return model.to_bytes({"domains": domains})


def _ngrams(context: Context, corpus: CorpusSection, step: StepInput, work: Sequence[Unit], characters: int) -> Codes:
    """The n-grams of the sample, in its order."""
    arguments = (corpus, _of_messages(corpus, step), characters)
    parts: dict[int, Codes] = {}
    units = pa.Table.from_pylist(list(work))
    for table in context.runner.map(NgramsOfSample, arguments, units, Resources(accelerator=False)):
        lengths, ids, values = (table.column(name).combine_chunks().flatten().to_numpy() for name in ("lengths", "ids", "values"))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        parts[table.column("unit")[0].as_py()] = Codes(offsets, ids, values, BUCKETS)
    return Codes.concatenated([parts[unit] for unit in sorted(parts)])


def _stopped(units: Sequence[Unit], records: Sequence[Record], step: StepInput) -> list[Unit]:
    """Units of the audit in which something was stopped: of their `rows` what was is embedded."""
    some = {record["unit"] for record in records if record["passed"] < record["rows"]}
    return [
        unit | {"screened": storage.join(step.uri, shard_of("screened", unit["unit"])), "passed": False}
        for unit in units
        if unit["unit"] in some
    ]


def _of_messages(corpus: CorpusSection, step: StepInput) -> ModelReference | None:
    """The model, for its chat template: none where no template is needed, as a reference to it alone imports torch."""
    return model_of(step["model"]) if corpus.messages is not None else None
