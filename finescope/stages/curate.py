"""`curate`: the exact best documents, read again from the corpus by their locators, filtered, ranked."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from finescope import directories, schemas, storage
from finescope.config import CorpusSection, CurateSection
from finescope.corpus.documents import read_selected, read_strings
from finescope.curation.codes import codes_of
from finescope.curation.decontaminate import NgramIndex
from finescope.curation.diversity import MarginalRelevance
from finescope.curation.examine import FINDINGS, Examiner
from finescope.curation.near_duplicates import NearDuplicates
from finescope.curation.ranking import Eligible, Ranking, located_rows
from finescope.curation.select import Candidate, Limits, Selection, diverse, with_spare
from finescope.curation.staging import PART_ROWS, POSITION, UNIT, Staging
from finescope.errors import StepFailed
from finescope.manifest import Manifest, TableFile
from finescope.models.load import ModelReference, load_tokenizer
from finescope.runners.base import Context, Resources
from finescope.stages.dataset_card import dataset_card
from finescope.stages.references import index_units, model_of
from finescope.steps import Outcome, StepInput

# Columns that are put by with a row and are no part of it.
_ASIDE = [POSITION, UNIT, *FINDINGS.names]


class _Examine:
    """Reads some rows of one unit and examines them; the table worker of this step."""

    def __init__(self, section: CorpusSection, model: ModelReference, examiner: Examiner) -> None:
        self._section, self._examiner = section, examiner
        self._tokenizer = load_tokenizer(model) if section.messages else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        rows = read_selected(unit, unit["rows"], self._section, self._tokenizer).drop_columns(["__row"])
        findings = self._examiner(rows.column("text").to_pylist())
        aside = [pa.array(unit["positions"], pa.int64()), pa.array([unit["unit"]] * rows.num_rows, pa.int64()), *findings]
        for name, column in zip(_ASIDE, aside, strict=True):
            rows = rows.append_column(name, column)
        return rows


def curate(context: Context, corpus: CorpusSection, section: CurateSection, step: StepInput) -> Outcome:
    """Walk down the ranking until a limit is reached. Rows in are the documents that were looked at.

    What is read is put by on a local disk, so that neither texts nor rows are held in memory; an attempt that ends early
    leaves nothing that counts, and begins anew.

    Raises:
        StepFailed: no document is left.
    """
    for table in ("curated", "rejects"):
        storage.delete(storage.join(step.uri, table))
    scores = step["score"]
    ranking = Ranking.of(scores.files("scores"), Eligible(section.threshold))
    # A share is of the documents that a screen stopped, too.
    documents = scores.tables["scores"].rows + (int(step["screen"].facts["stopped"]) if "screen" in step.inputs else 0)
    limits = Limits.of(section, documents, len(scores.facts["seeds"]))
    with directories.scratch_directory(storage.join(step.uri, "staging")) as scratch:
        staging = Staging(scratch)
        filtered = limits.pool if section.diversity else limits
        ranked, selection = _filtered(context, corpus, section, step, ranking, filtered, staging)
        if section.diversity and selection.kept:
            chosen = _diverse(ranked, selection, section.diversity, limits, step)
            chosen.rejected += selection.rejected
            selection = chosen
        if not selection.kept:
            raise StepFailed(f"no document was kept: {selection.looked_at} looked at, threshold {section.threshold}")
        if limits.documents is not None and len(selection.kept) < limits.documents and not selection.full:
            context.reporter.warn(
                f"curate: {limits.documents} documents are asked for, and {len(selection.kept)} are left after all filters"
            )
        tables = {
            "curated": _write_curated(step.uri, ranked, selection, staging),
            "rejects": _write_rejects(step.uri, ranked, selection, index_units(step["index"])),
        }
    kept = ranked[selection.kept]
    facts = {
        "lowest_score": kept["score"].min(),
        "highest_score": kept["score"].max(),
        "tokens": selection.tokens,
        "scored": scores.tables["scores"].rows,
        "reasons": dict(sorted(_count(reason for _, reason, _ in selection.rejected).items())),
    }
    card = dataset_card(step, section, tables["curated"], facts)
    storage.put_bytes(storage.join(step.uri, "README.md"), card.encode())
    return Outcome(selection.looked_at, len(selection.kept), len(selection.rejected), tables, facts)


def _filtered(
    context: Context,
    corpus: CorpusSection,
    section: CurateSection,
    step: StepInput,
    ranking: Ranking,
    limits: Limits,
    staging: Staging,
) -> tuple[pl.DataFrame, Selection]:
    """The ranking as far as it was read, and what of it passes.

    Where filters took more than was read, what is missing is read, and then twice as much each time.
    """
    shingle = section.duplicate_shingle if section.drops_near_duplicates else None
    ngrams = NgramIndex.build(read_strings(section.decontaminate)) if section.decontaminate else None
    examine = (corpus, model_of(step["model"]), Examiner(bool(section.deduplicate), shingle, ngrams))
    near = None
    if shingle is not None:
        near = NearDuplicates(section.duplicate_jaccard, shingle, lambda position: str(staging.value(position, "text")))
    selection = Selection(limits, near)
    asked = min(limits.documents or ranking.size, ranking.reaching(limits.tokens) if limits.tokens else ranking.size)
    seeds = frozenset(range(len(step["score"].facts["seeds"])))
    ranked, count, again = ranking.best(0), with_spare(asked), 0
    while (more := ranking.after(ranked, count)).height:
        start, ranked = ranked.height, pl.concat([ranked, more])
        work = _work(more, start, step["index"])
        with context.reporter.task("curate: reading", more.height, "documents") as progress:
            for rows in context.runner.map(_Examine, examine, work, Resources(accelerator=False)):
                staging.add(rows)
                progress(rows.num_rows)
        staging.seal()
        for candidate in _candidates(ranked, staging, start):
            selection.offer(candidate)
            if selection.full:
                return ranked, selection
        # Of a seed that has its quota nothing more is read, or the last document of a rare one would cost the whole corpus.
        left = seeds - selection.full_seeds
        if left != (ranking.eligible.seeds or seeds):
            ranking = ranking.of_seeds(left)
        missing = limits.documents - len(selection.kept) if limits.documents else ranked.height
        count = again = max(with_spare(missing), 2 * again)
    return ranked, selection


def _work(ranked: pl.DataFrame, start: int, index: Manifest) -> pa.Table:
    """The units that hold the documents of a part of the ranking, with `rows` and `positions` of each."""
    places = ranked.with_columns(positions=pl.int_range(start, start + ranked.height, dtype=pl.Int64))
    found = places.group_by("file", "row_group").agg(pl.col("row").alias("rows"), "positions")
    units = {(unit["file_index"], unit["row_group"]): unit for unit in index_units(index)}
    rows = [units[file, group] | {"rows": rows, "positions": at} for file, group, rows, at in found.iter_rows()]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["unit"]))


def _candidates(ranked: pl.DataFrame, staging: Staging, start: int) -> Iterator[Candidate]:
    """The documents of the ranking from `start` on, with what was found."""
    for part in staging.from_position(start, [POSITION, *FINDINGS.names]):
        first = part.column(POSITION)[0].as_py()
        known = ranked.slice(first, part.num_rows)
        columns = [known["doc_id"], known["seed"], known["num_tokens"], *(part.column(n).to_pylist() for n in FINDINGS.names)]
        for offset, values in enumerate(zip(*columns, strict=True)):
            yield Candidate(first + offset, *values)


def _diverse(ranked: pl.DataFrame, selection: Selection, diversity: float, limits: Limits, step: StepInput) -> Selection:
    """Of what passed the filters, the most diverse by their codes."""
    pool = ranked[selection.kept]
    codes = located_rows(step["embed"].files("embeddings"), pool, ["latent_ids", "latent_values"])
    codes = codes_of(codes, int(step["sae"].facts["num_latents"]))
    order = MarginalRelevance(pool["score"].to_numpy(), codes, diversity)
    known = zip(selection.kept, pool["doc_id"], pool["seed"], pool["num_tokens"], strict=True)
    return diverse([Candidate(*values) for values in known], order, limits)


def _write_curated(uri: str, ranked: pl.DataFrame, selection: Selection, staging: Staging) -> tuple[TableFile, ...]:
    """Shards of `curated`: rank, doc_id, score, seed, the source's columns as `read_selected` names them, text."""
    files = []
    for start in range(0, len(selection.kept), PART_ROWS):
        positions = selection.kept[start : start + PART_ROWS]
        chosen = ranked[positions]
        head = {
            "rank": pa.array(np.arange(start + 1, start + len(positions) + 1)),
            "doc_id": pa.array(chosen["doc_id"].to_list(), pa.string()),
            "score": pa.array(chosen["score"].to_numpy(), pa.float32()),
            "seed": pa.array(chosen["seed"].to_numpy(), pa.int32()),
        }
        source = staging.take(positions).drop_columns(_ASIDE)
        middle = {name: source.column(name) for name in source.column_names if name != "text"}
        table = pa.table({**head, **middle, "text": source.column("text").cast(pa.string())})
        files.append(_put(uri, "curated", len(files), table))
    return tuple(files)


def _write_rejects(uri: str, ranked: pl.DataFrame, selection: Selection, units: list[dict[str, Any]]) -> tuple[TableFile, ...]:
    names = pl.DataFrame({"file": [u["file_index"] for u in units], "name": [u["file"] for u in units]}).unique()
    rejected = sorted(selection.rejected)
    files = []
    for start in range(0, len(rejected), PART_ROWS):
        part = rejected[start : start + PART_ROWS]
        places = ranked[[position for position, _, _ in part]].join(
            names.cast({"file": ranked.schema["file"]}), on="file", how="left", maintain_order="left"
        )
        columns = {
            "doc_id": places["doc_id"].to_list(),
            "step": ["curate"] * len(part),
            "file": places["name"].to_list(),
            "row_group": places["row_group"].to_list(),
            "row": places["row"].to_list(),
            "reason": [reason for _, reason, _ in part],
            "detail": [detail for _, _, detail in part],
        }
        files.append(_put(uri, "rejects", len(files), pa.table(columns, schema=schemas.REJECTS)))
    return tuple(files)


def _put(uri: str, name: str, number: int, table: pa.Table) -> TableFile:
    path = f"{name}/part-{number:06d}.parquet"
    return TableFile(path=path, rows=table.num_rows, bytes=storage.put_parquet(storage.join(uri, path), table))


def _count(values: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
