"""`embed`: one sparse code a document. A unit of work is done when its shard and then its record are on storage."""

import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
# What is kept of a unit: an object of JSON on storage, a row of this from the worker.
_RECORD = pa.schema(
    [
        *((name, pa.int64()) for name in ("unit", "rows_in", "rows", "rejects")),
        ("reasons", pa.map_(pa.string(), pa.int64())),
        ("tokens", pa.int64()),
        ("fvu_sum", pa.float64()),
        *((name, pa.int64()) for name in ("rejects_bytes", "bytes")),
    ]
)
# One unit is computed, another read or written meanwhile.
UNITS_AT_ONCE = 2
# Records of an earlier attempt that are read at a time: each is a request to an object store.
_READERS = 32


class EmbedUnit:
    """Embeds one unit; the table worker of this step. The model is loaded when the first unit comes.

    Two threads may call it: while the codes of one unit are computed, the next is read and tokenised and the one before
    is written, so that the device never waits for storage.
    """

    def __init__(self, model: ModelReference, dictionary: str, corpus: CorpusSection, section: EmbedSection, uri: str) -> None:
        self._embedder = Embedder(model, dictionary, section)
        self._corpus, self._uri = corpus, uri
        self._reading, self._computing = threading.Lock(), threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        with self._reading:
            documents = read_documents(unit, self._corpus, unit["name"], self._embedder.tokenizer, unit["take"], "embed")
            tokens = self._embedder.tokens(documents.table.column("text").to_pylist())
        with self._computing:
            embedded = self._embedder.codes(tokens)
        count = documents.table.num_rows
        table = pa.table(
            {
                "doc_id": documents.table.column("doc_id"),
                "file": np.full(count, unit["file_index"], np.int32),
                "row_group": np.full(count, unit["row_group"], np.int32),
                "row": documents.table.column("row"),
                **{name: embedded.column(name) for name in embedded.column_names},
            }
        )
        # The first position is no part of a code (an attention sink), so that a document of one token has none.
        short = table.column("num_tokens").to_numpy() < 2
        rejects = pa.concat_tables([documents.rejects, _too_short(table.filter(pa.array(short)), unit)])
        embeddings = schemas.conform(table.filter(pa.array(~short)), schemas.EMBEDDINGS)
        return pa.Table.from_pylist([self._write(unit, embeddings, rejects, documents.num_rows_in)], schema=_RECORD)

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
            "reasons": dict(sorted(Counter(rejects.column("reason").to_pylist()).items())),
            "tokens": int(embeddings.column("num_tokens").to_numpy().sum(dtype=np.int64)),
            "fvu_sum": float(embeddings.column("fvu").to_numpy().sum(dtype=np.float64)),
            **sizes,
        }
        storage.put_json(storage.join(self._uri, _RECORDS, f"{unit['unit']:06d}.json"), record)
        return record


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
    resources = Resources(memory_bytes(model), units_at_once=UNITS_AT_ONCE)
    with context.reporter.task("embed", sum(unit["take"] for unit in units), "documents") as progress:
        records = _records(step.uri, [unit["unit"] for unit in units if unit["unit"] in done])
        progress(sum(record["rows_in"] for record in records))
        for table in context.runner.map(EmbedUnit, arguments, left, resources):
            (record,) = table.to_pylist(maps_as_pydicts="strict")
            records.append(record)
            progress(record["rows_in"])
    # Sums of floats depend on the order, and units come in any.
    records.sort(key=lambda record: record["unit"])
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


def _records(uri: str, units: Iterable[int]) -> list[dict[str, Any]]:
    """The records of units that are done."""
    paths = [storage.join(uri, _RECORDS, f"{unit:06d}.json") for unit in units]
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(storage.read_json, paths))


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
