"""The workers of `screen` that read text alone. No torch, so that as many of them start as there are cores."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from finescope import schemas, storage
from finescope.config import CorpusSection
from finescope.corpus.documents import Documents, read_documents
from finescope.curation.ngrams import hashed_ngrams
from finescope.curation.screen import Screen
from finescope.stages.units import write_unit

if TYPE_CHECKING:
    from finescope.models.load import ModelReference


class _Reader:
    """Reads the documents of units; only messages need a tokenizer, and with it the model, for its chat template."""

    def __init__(self, corpus: CorpusSection, model: "ModelReference | None") -> None:
        self._corpus, self._tokenizer = corpus, None
        if corpus.messages is not None:
            from finescope.models.load import load_tokenizer

            assert model is not None
            self._tokenizer = load_tokenizer(model)

    def __call__(self, unit: dict[str, Any]) -> Documents:
        return read_documents(unit, self._corpus, unit["name"], self._tokenizer, unit["take"], "screen")


class NgramsOfSample:
    """N-grams of those documents of a unit that are in its shard of `sampled`: a row with lists `lengths`, `ids`, `values`."""

    def __init__(self, corpus: CorpusSection, model: "ModelReference | None", characters: int) -> None:
        self._read, self._characters = _Reader(corpus, model), characters

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        rows = storage.read_parquet(unit["sampled"], ["row"]).column("row").to_numpy()
        documents = self._read(unit).table
        embedded = np.isin(documents.column("row").to_numpy(), rows)
        texts = documents.column("text").filter(pa.array(embedded)).to_pylist()
        assert len(texts) == len(rows), "documents that were embedded are there"
        found = hashed_ngrams(texts, self._characters)
        columns = {"lengths": np.diff(found.offsets), "ids": found.ids, "values": found.values}
        lists = {name: pa.ListArray.from_arrays([0, len(values)], pa.array(values)) for name, values in columns.items()}
        return pa.table({"unit": [unit["unit"]], **lists})


class ScreenUnit:
    """Holds every document of one unit against the screen; the table worker of this step."""

    def __init__(self, screen: Screen, corpus: CorpusSection, model: "ModelReference | None", uri: str) -> None:
        self._screen, self._read, self._uri = screen, _Reader(corpus, model), uri

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        documents = self._read(unit)
        margins = self._screen.margins(documents.table.column("text").to_pylist())
        screened = {
            "file": np.full(len(margins), unit["file_index"], np.int32),
            "row_group": np.full(len(margins), unit["row_group"], np.int32),
            "row": documents.table.column("row"),
            "margin": margins,
        }
        table, passed = schemas.conform(pa.table(screened), schemas.SCREENED), int((margins >= 0).sum())
        return write_unit(self._uri, unit["unit"], "screened", table, documents.rejects, documents.num_rows_in, passed=passed)
