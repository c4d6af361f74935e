"""`embed`: one sparse code a document. A unit of work is done when its shard and then its record are on storage."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from finescope import schemas, storage
from finescope.config import CorpusSection, EmbedSection
from finescope.corpus.documents import read_documents
from finescope.curation.embed import Embedder
from finescope.manifest import Manifest
from finescope.models.load import ModelReference
from finescope.runners.base import Context, Resources
from finescope.stages.references import limited_units, memory_bytes, model_of
from finescope.stages.units import Record, check_rate, map_units, records_at, rejected, shards, total, write_unit
from finescope.steps import Outcome, StepInput

Unit = dict[str, Any]  # see stages.references.limited_units

# One unit is computed, another read or written meanwhile.
UNITS_AT_ONCE = 2


class EmbedUnit:
    """Embeds one unit; the table worker of this step. The model is loaded when the first unit comes.

    All documents of the unit, or some. Those of `rows`, where the unit has them; and of these, where it has `screened`, the
    path of its shard of that table, those that passed, or, where `passed` is false, the others.

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
            documents, rejects, rows_in = self._read(unit)
            tokens = self._embedder.tokens(documents.column("text").to_pylist())
        with self._computing:
            embedded = self._embedder.codes(tokens)
        count = documents.num_rows
        table = pa.table(
            {
                "doc_id": documents.column("doc_id"),
                "file": np.full(count, unit["file_index"], np.int32),
                "row_group": np.full(count, unit["row_group"], np.int32),
                "row": documents.column("row"),
                **{name: embedded.column(name) for name in embedded.column_names},
            }
        )
        # The first position is no part of a code (an attention sink), so that a document of one token has none.
        short = table.column("num_tokens").to_numpy() < 2
        rejects = pa.concat_tables([rejects, _too_short(table.filter(pa.array(short)), unit)])
        embeddings = schemas.conform(table.filter(pa.array(~short)), schemas.EMBEDDINGS)
        known = {
            "tokens": int(embeddings.column("num_tokens").to_numpy().sum(dtype=np.int64)),
            "fvu_sum": float(embeddings.column("fvu").to_numpy().sum(dtype=np.float64)),
        }
        return write_unit(self._uri, unit["unit"], "embeddings", embeddings, rejects, rows_in, **known)

    def _read(self, unit: dict[str, Any]) -> tuple[pa.Table, pa.Table, int]:
        """Documents, rejects and rows in of a unit. Of some of its rows, those that are no documents were rejected elsewhere."""
        found = read_documents(unit, self._corpus, unit["name"], self._embedder.tokenizer, unit["take"], "embed")
        rows = found.table.column("row").to_numpy()
        chosen = np.ones(len(rows), bool)
        if unit.get("screened") is not None:
            screened = storage.read_parquet(unit["screened"], ["row", "margin"])
            assert np.array_equal(screened.column("row").to_numpy(), rows), "the documents that the screen saw"
            chosen = (screened.column("margin").to_numpy() >= 0) == unit["passed"]
        elif unit.get("rows") is None:
            return found.table, found.rejects, found.num_rows_in
        if unit.get("rows") is not None:
            chosen &= np.isin(rows, unit["rows"])
        documents = found.table.filter(pa.array(chosen))
        return documents, found.rejects.slice(0, 0), documents.num_rows


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
    """Embed every document of the corpus, or those that the screen let through; units that an earlier attempt did are taken
    as they are.

    Raises:
        CorpusError: a file is gone or has changed since `index`.
        StepFailed: more than `max_reject_rate` of the rows are rejected.
    """
    units = [unit for unit in limited_units(step["index"], corpus.limit) if unit["take"] > 0]
    documents = sum(unit["take"] for unit in units)
    if "screen" in step.inputs:
        units, documents = _passed(units, step["screen"])
    records = embedded_units(context, "embed", corpus, section, step, units, step.uri, documents)
    check_rate(records, corpus.max_reject_rate)
    rows = total(records, "rows")
    tables = {"embeddings": shards(records, "embeddings"), "rejects": rejected(records)}
    fvu = sum(record["fvu_sum"] for record in records) / max(rows, 1)
    facts = {"tokens": total(records, "tokens"), "fvu": fvu, "units": len(units)}
    return Outcome(total(records, "rows_in"), rows, total(records, "rejects"), tables, facts)


def _passed(units: Sequence[Unit], screen: Manifest) -> tuple[list[Unit], int]:
    """The units of which something passed the screen, each with its shard of `screened`; and how many documents did."""
    records = records_at(screen.uri, [unit["unit"] for unit in units])
    found = zip(units, screen.files("screened"), records, strict=True)
    left = [unit | {"screened": shard, "passed": True} for unit, shard, record in found if record["passed"]]
    return left, total(records, "passed")


def embedded_units(
    context: Context,
    name: str,
    corpus: CorpusSection,
    section: EmbedSection,
    step: StepInput,
    units: Sequence[Unit],
    uri: str,
    documents: int,
) -> list[Record]:
    """Embed `units` (see `EmbedUnit`), of about so many `documents`, into a table `embeddings` at `uri`; their records."""
    model = model_of(step["model"])
    arguments = (model, storage.join(step["sae"].uri, "dictionary"), corpus, section, uri)
    resources = Resources(memory_bytes(model), units_at_once=UNITS_AT_ONCE)
    return map_units(context, name, EmbedUnit, arguments, units, resources, uri, documents)
