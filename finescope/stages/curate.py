"""`curate`: the exact best documents, read again from the corpus by their locators, filtered, ranked."""

from collections.abc import Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from finescope import schemas
from finescope.config import CorpusSection, CurateSection
from finescope.corpus.decontaminate import NgramIndex
from finescope.corpus.documents import read_strings
from finescope.corpus.reading import concat_rows
from finescope.curation.select import Selection, candidates, windows
from finescope.errors import StepFailed
from finescope.runners.base import Context
from finescope.stages.references import index_units, model_of, read_located, write_table
from finescope.steps import Outcome, StepInput


def curate(context: Context, corpus: CorpusSection, section: CurateSection, step: StepInput) -> Outcome:
    """Walk down the ranking until `documents` are kept. Rows in are the documents that were looked at.

    Raises:
        StepFailed: no document is left.
    """
    index, scores, model = step["index"], step["score"], model_of(step["model"])
    ngrams = NgramIndex.build(read_strings(section.decontaminate)) if section.decontaminate else None
    selection = Selection(section, ngrams)
    scored = scores.tables["scores"].rows
    kept: list[dict[str, Any]] = []
    looked_at = 0
    ranking = pl.DataFrame()
    for start, end in windows(scored, section.documents):
        ranking = candidates(scores.files("scores"), section.threshold, end)
        window = ranking.slice(start, end - start)
        if window.is_empty():
            break
        rows = read_located(context, index, model, corpus, window, "curate: reading")
        for offset, (row, doc_id, seed, text) in enumerate(
            zip(range(rows.num_rows), window["doc_id"], window["seed"], rows.column("text").to_pylist(), strict=True)
        ):
            if selection.full:
                break
            count = len(selection.kept)
            selection.offer(start + offset, doc_id, seed, text)
            looked_at += 1
            if len(selection.kept) > count:
                kept.append({"row": rows.slice(row, 1)})
        if selection.full:
            break
    if not selection.kept:
        raise StepFailed(f"no document was kept: {looked_at} looked at, threshold {section.threshold}")
    if not selection.full:
        context.reporter.warn(
            f"curate.documents asks for {section.documents}, and {len(selection.kept)} are left after threshold and filters"
        )
    curated = _curated(ranking, selection, [item["row"] for item in kept])
    rejects = _rejects(ranking, selection, index_units(index))
    tables = {"curated": write_table(step.uri, "curated", curated), "rejects": write_table(step.uri, "rejects", rejects)}
    facts = {
        "lowest_score": float(curated.column("score")[-1].as_py()),
        "scored": scored,
        "reasons": dict(sorted(_count(reason for _, reason, _ in selection.rejected).items())),
    }
    return Outcome(looked_at, curated.num_rows, rejects.num_rows, tables, facts)


def _curated(ranking: pl.DataFrame, selection: Selection, rows: Sequence[pa.Table]) -> pa.Table:
    """The curated table: rank, doc_id, score, seed, the source's columns as `read_selected` names them, text."""
    chosen = ranking[selection.kept]
    source = concat_rows(rows)
    head = {
        "rank": pa.array(range(1, chosen.height + 1), pa.int64()),
        "doc_id": pa.array(chosen["doc_id"].to_list(), pa.string()),
        "score": pa.array(chosen["score"].to_list(), pa.float32()),
        "seed": pa.array(chosen["seed"].to_list(), pa.int32()),
    }
    text = source.column("text").cast(pa.string())
    middle = {name: source.column(name) for name in source.column_names if name != "text"}
    return pa.table({**head, **middle, "text": text})


def _rejects(ranking: pl.DataFrame, selection: Selection, units: list[dict[str, Any]]) -> pa.Table:
    files = {unit["file_index"]: unit["file"] for unit in units}
    rows = []
    for position, reason, detail in selection.rejected:
        entry = ranking.row(position, named=True)
        place = {"file": files[entry["file"]], "row_group": entry["row_group"], "row": entry["row"]}
        rows.append({"doc_id": entry["doc_id"], "step": "curate", **place, "reason": reason, "detail": detail})
    return pa.Table.from_pylist(rows, schema=schemas.REJECTS)


def _count(values: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts
