"""`embed`: one sparse code a document. A unit of work is done when its shard and then its record are on storage."""

from typing import Any

import numpy as np
import pyarrow as pa

from finescope import schemas, storage
from finescope.config import CorpusSection, EmbedSection
from finescope.corpus.documents import read_documents
from finescope.curation.embed import Embedder
from finescope.errors import StepFailed
from finescope.manifest import TableFile
from finescope.models.load import ModelReference
from finescope.runners.base import Context, Resources
from finescope.stages.references import limited_units, memory_bytes, model_of
from finescope.steps import Outcome, StepInput

_RECORDS = "units"


class _EmbedUnit:
    """Embeds one unit; the table worker of this step. The model is loaded when the first unit comes."""

    def __init__(self, model: ModelReference, dictionary: str, corpus: CorpusSection, section: EmbedSection, uri: str) -> None:
        self._embedder = Embedder(model, dictionary, section)
        self._corpus, self._uri = corpus, uri

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        documents = read_documents(unit, self._corpus, unit["name"], self._embedder.tokenizer, unit["take"], "embed")
        embedded = self._embedder(documents.table.column("text").to_pylist())
        count = documents.table.num_rows
        table = pa.table(
            {
                "doc_id": documents.table.column("doc_id"),
                "file": pa.array([unit["file_index"]] * count, pa.int32()),
                "row_group": pa.array([unit["row_group"]] * count, pa.int32()),
                "row": documents.table.column("row"),
                **{name: embedded.column(name) for name in embedded.column_names},
            }
        )
        # The first position is no part of a code (an attention sink), so that a document of one token has none.
        short = np.array(table.column("num_tokens").to_pylist(), np.int64) < 2
        rejects = pa.concat_tables([documents.rejects, _too_short(table.filter(pa.array(short)), unit)])
        embeddings = schemas.conform(table.filter(pa.array(~short)), schemas.EMBEDDINGS)
        return pa.Table.from_pylist([self._write(unit, embeddings, rejects, documents.num_rows_in)])

    def _write(self, unit: dict[str, Any], embeddings: pa.Table, rejects: pa.Table, rows_in: int) -> dict[str, Any]:
        """Shards first, the record that makes them count last. A unit done twice writes the same bytes to the same names."""
        name = f"part-{unit['unit']:06d}.parquet"
        sizes = {"rejects_bytes": 0, "bytes": 0}
        if rejects.num_rows:
            sizes["rejects_bytes"] = storage.put_parquet(storage.join(self._uri, "rejects", name), rejects)
        sizes["bytes"] = storage.put_parquet(storage.join(self._uri, "embeddings", name), embeddings)
        record = {
            "unit": unit["unit"],
            "rows_in": rows_in,
            "rows": embeddings.num_rows,
            "rejects": rejects.num_rows,
            "reasons": dict(sorted(_counts(rejects.column("reason").to_pylist()).items())),
            "tokens": int(sum(embeddings.column("num_tokens").to_pylist())),
            "fvu_sum": float(sum(embeddings.column("fvu").to_pylist())),
            **sizes,
        }
        storage.put_json(storage.join(self._uri, _RECORDS, f"{unit['unit']:06d}.json"), record)
        return {key: value for key, value in record.items() if key != "reasons"}


def _too_short(rows: pa.Table, unit: dict[str, Any]) -> pa.Table:
    rejects = [
        {
            "doc_id": row["doc_id"],
            "step": "embed",
            "file": unit["file"],
            "row_group": unit["row_group"],
            "row": row["row"],
            "reason": "too_short",
            "detail": f"{row['num_tokens']} tokens",
        }
        for row in rows.to_pylist()
    ]
    return pa.Table.from_pylist(rejects, schema=schemas.REJECTS)


def embed(context: Context, corpus: CorpusSection, section: EmbedSection, step: StepInput) -> Outcome:
    """Embed every document of the corpus; units that an earlier attempt did are taken as they are.

    Raises:
        CorpusError: a file is gone or has changed since `index`.
        StepFailed: more than `max_reject_rate` of the rows are rejected.
    """
    units = [unit for unit in limited_units(step["index"], corpus.limit) if unit["take"] > 0]
    done = {int(name.removesuffix(".json")) for name in storage.list_names(storage.join(step.uri, _RECORDS))}
    model = model_of(step["model"])
    arguments = (model, storage.join(step["sae"].uri, "dictionary"), corpus, section, step.uri)
    left = pa.Table.from_pylist([unit for unit in units if unit["unit"] not in done])
    with context.reporter.task("embed", sum(unit["take"] for unit in units), "documents") as progress:
        progress(sum(unit["take"] for unit in units if unit["unit"] in done))
        for record in context.runner.map(_EmbedUnit, arguments, left, Resources(memory_bytes(model))):
            progress(sum(record.column("rows_in").to_pylist()))
    records = [storage.read_json(storage.join(step.uri, _RECORDS, f"{unit['unit']:06d}.json")) for unit in units]
    rows_in = sum(record["rows_in"] for record in records)
    rejects = sum(record["rejects"] for record in records)
    _check_rate(rows_in, rejects, records, corpus.max_reject_rate)
    rows = sum(record["rows"] for record in records)
    tables = {
        "embeddings": tuple(_file("embeddings", r["unit"], r["rows"], r["bytes"]) for r in records),
        "rejects": tuple(_file("rejects", r["unit"], r["rejects"], r["rejects_bytes"]) for r in records if r["rejects"]),
    }
    tokens = sum(record["tokens"] for record in records)
    facts = {"tokens": tokens, "fvu": sum(record["fvu_sum"] for record in records) / max(rows, 1), "units": len(units)}
    return Outcome(rows_in, rows, rejects, tables, facts)


def _check_rate(rows: int, rejects: int, records: list[dict[str, Any]], most: float) -> None:
    reasons: dict[str, int] = {}
    for record in records:
        for reason, count in record["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    if rows == 0:
        raise StepFailed("the corpus has no row")
    if rejects / rows > most:
        leading = max(reasons, key=lambda reason: (reasons[reason], reason))
        raise StepFailed(
            f"{rejects:,} of {rows:,} rows are rejected, more than corpus.max_reject_rate ({most}) allows; "
            f"{reasons[leading]:,} of them: {leading}"
        )
    if rejects == rows:
        raise StepFailed("every row of the corpus is rejected")


def _file(table: str, unit: int, rows: int, size: int) -> TableFile:
    return TableFile(path=f"{table}/part-{unit:06d}.parquet", rows=rows, bytes=size)


def _counts(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in set(values)}
