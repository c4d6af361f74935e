"""Where curated documents are from, and their texts, of a corpus of two files without a column `source`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import build_run

from finescope import schemas, storage
from finescope.analysis import origins
from finescope.config import CorpusSection
from finescope.corpus.files import resolve
from finescope.corpus.shapes import recognise
from finescope.manifest import Manifest, Table, TableFile

TEXTS = {"a.parquet": ["a0", "a1", "a2", "a3"], "b.parquet": ["b0", "b1", "b2", "b3"]}
# (file, row group, row, score); the first three are curated.
PLACES = [(1, 1, 0, 0.9), (0, 0, 1, 0.8), (1, 0, 0, 0.7), (0, 1, 1, 0.6), (0, 0, 0, 0.5)]


def _manifest(root: Path, step: str, table: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, **more: Any) -> Manifest:
    uri, path = str(root / step), f"{table}/part-000000.parquet"
    size = storage.put_parquet(storage.join(uri, path), pa.Table.from_pylist(list(rows), schema=schema))
    tables = {table: Table(files=(TableFile(path=path, rows=len(rows), bytes=size),))}
    record: dict[str, Any] = {"step": step, "version": 1, "identity": step, "uri": uri, "section": {}, "inputs": {}, "rows_in": 0}
    record |= {"rows_out": 0, "rejects": 0, "facts": {}, "versions": {}, "machine": "", "started": "", "finished": ""}
    return Manifest.model_validate(record | {"seconds": 0.0, "tables": tables} | more)


@pytest.fixture
def manifests(tmp_path: Path) -> dict[str, Manifest]:
    units = []
    for name, texts in TEXTS.items():
        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=2)
        found = storage.info(str(tmp_path / name))
        place = {"file": found.path, "etag": found.etag, "num_rows": 2, "bytes": 10}
        units += [place | {"row_group": group} for group in range(2)]
    scores = [
        {"doc_id": f"d{at}", "file": file, "row_group": group, "row": row, "score": score, "num_tokens": 2, "seed": 0}
        for at, (file, group, row, score) in enumerate(PLACES)
    ]
    curated = [{"rank": at + 1, "doc_id": f"d{at}", "score": PLACES[at][3], "seed": 0, "text": ""} for at in range(3)]
    facts = {"directory": f"{tmp_path}/", "shape": None}
    section = {"path": [str(tmp_path / "*.parquet")], "text": "text"}
    curated_schema = pa.schema([*schemas.CURATED_HEAD, *schemas.CURATED_TAIL])
    return {
        "index": _manifest(tmp_path, "index", "documents", units, schemas.DOCUMENTS, facts=facts, section=section),
        "score": _manifest(tmp_path, "score", "scores", scores, schemas.SCORES),
        "curate": _manifest(tmp_path, "curate", "curated", curated, curated_schema),
    }


def test_shares_are_of_files_where_there_is_no_source(manifests: dict[str, Manifest]) -> None:
    found = origins.shares(manifests).select("source", "documents", "corpus", "corpus_share").rows()
    assert found == [("b.parquet", 2, 4, 0.5), ("a.parquet", 1, 4, 0.5)]


def test_shares_count_the_rows_that_are_read(manifests: dict[str, Manifest]) -> None:
    def limited(limit: int) -> dict[str, Manifest]:
        section = manifests["index"].section | {"limit": limit}
        return manifests | {"index": manifests["index"].model_copy(update={"section": section})}

    found = origins.shares(limited(5)).select("source", "corpus", "corpus_share").rows()
    assert sorted(found) == [("a.parquet", 4, 0.8), ("b.parquet", 1, 0.2)]
    assert origins.shares(limited(4)).is_empty(), "all is of the first file"


def test_shares_are_of_sources_where_there_are_some(tmp_path: Path) -> None:
    assert origins.shares(build_run(str(tmp_path), until="curate")).row(0)[:2] == ("sympy", 36)
    assert origins.shares({}).is_empty()


def _places(rows: Sequence[tuple[int, int, int]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["file", "row_group", "row"], orient="row")


def test_texts_are_read_again_by_place(manifests: dict[str, Manifest]) -> None:
    places = _places([place[:3] for place in PLACES])
    assert origins.texts(manifests, places) == ["b2", "a1", "b0", "a3", "a0"]
    assert origins.texts(manifests, places.clear()) == []


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"instruction": ["add"], "output": ["3"]}, "add\n3"),
        ({"messages": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]}, None),
    ],
)
def test_texts_are_made_of_the_shape_that_was_recognised(tmp_path: Path, columns: dict[str, Any], text: str | None) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    corpus = CorpusSection.model_validate({"path": [str(tmp_path / "*.parquet")]})
    found, files = storage.info(str(tmp_path / "a.parquet")), resolve(corpus)
    unit = {"file": found.path, "etag": found.etag, "num_rows": 1, "bytes": 10, "row_group": 0}
    shape = recognise(corpus, files)
    assert shape is not None
    facts, section = {"shape": shape._asdict()}, corpus.model_dump(mode="json")
    index = _manifest(tmp_path, "index", "documents", [unit], schemas.DOCUMENTS, facts=facts, section=section)
    assert origins.texts({"index": index}, _places([(0, 0, 0)])) == [text]


def test_texts_of_a_file_that_has_changed_are_none(manifests: dict[str, Manifest], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["other"] * 4}), tmp_path / "a.parquet", row_group_size=2)
    assert origins.texts(manifests, _places([(0, 0, 0), (1, 0, 1)])) == [None, "b1"]
    (tmp_path / "b.parquet").unlink()
    assert origins.texts(manifests, _places([(1, 0, 1)])) == [None]


def test_texts_of_messages_are_none(manifests: dict[str, Manifest]) -> None:
    section = manifests["index"].section | {"messages": "messages"}
    chat = manifests | {"index": manifests["index"].model_copy(update={"section": section})}
    assert origins.texts(chat, _places([(0, 0, 0)])) == [None]
