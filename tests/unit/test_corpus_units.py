from pathlib import Path

import pytest
from corpus_files import jsonl, parquet, section

from finescope import schemas
from finescope.config import CorpusSection
from finescope.corpus.files import resolve
from finescope.corpus.units import IDS, Inspection, inspect_file, needed_columns
from finescope.errors import CorpusError, RecipeError


def _inspect(corpus: CorpusSection) -> list[Inspection]:
    return [inspect_file(file, corpus) for file in resolve(corpus)]


def test_a_row_group_is_a_unit(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"text": ["x" * 100] * 5, "big": ["y" * 10_000] * 5}, rows_per_group=2)
    found = _inspect(section(tmp_path))[0]
    assert found.documents.schema.equals(schemas.DOCUMENTS)
    assert found.documents.column("num_rows").to_pylist() == [2, 2, 1]
    assert found.documents.column("row_group").to_pylist() == [0, 1, 2]
    assert max(found.documents.column("bytes").to_pylist()) < 1000, "of the needed column only"
    assert found.columns == ("text", "big")
    assert found.rejects.num_rows == 0
    assert found.ids is None


def test_a_small_line_file_is_a_unit_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"text": "a"}, b"", b"{bad", {"other": 1})
    jsonl(tmp_path / "b.jsonl.gz", {"text": "a"})
    (tmp_path / "c.csv").write_text("text\na\nb\n")
    (tmp_path / "d.txt").write_text("a")
    (tmp_path / "e.jsonl").write_text("\n")
    found = _inspect(section(tmp_path))
    assert [item.documents.column("num_rows").to_pylist() for item in found] == [[3], [1], [2], [1], [0]]
    assert found[0].columns == ("text", "other")
    assert found[0].documents.column("bytes").to_pylist() == [(tmp_path / "a.jsonl").stat().st_size]


@pytest.mark.parametrize("id", [None, "id"])
def test_damaged_files_are_rejected_whole(tmp_path: Path, id: str | None) -> None:
    whole = parquet(tmp_path / "a.parquet", {"id": ["1"], "text": ["a"]})
    whole.write_bytes(whole.read_bytes()[:-20])
    (tmp_path / "b.parquet").write_bytes(b"")
    cut = jsonl(tmp_path / "c.jsonl.gz", *({"id": str(i), "text": "a"} for i in range(5000)))
    cut.write_bytes(cut.read_bytes()[:-10])
    (tmp_path / "d.jsonl.zst").write_bytes(b"not zstd at all")
    (tmp_path / "e.csv.gz").write_bytes(b"not gzip")
    jsonl(tmp_path / "f.jsonl", {"id": "x", "text": "fine"})
    *damaged, fine = _inspect(section(tmp_path, id=id))
    for item in damaged:
        assert item.documents.num_rows == 0
        (row,) = item.rejects.to_pylist()
        assert (row["step"], row["row"], row["row_group"], row["reason"]) == ("index", None, None, "unreadable_file")
        assert row["detail"]
        assert item.rejects.schema.equals(schemas.REJECTS)
    assert len(damaged) == 5
    assert fine.documents.num_rows == 1
    assert fine.rejects.num_rows == 0


def test_missing_columns_are_named_with_those_that_exist(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"question": ["a"], "answer": ["b"]})
    with pytest.raises(CorpusError, match=r"no column 'text'; it has: question, answer"):
        _inspect(section(tmp_path))
    for settings in ({"id": "key"}, {"messages": "key"}, {"prompt": "{key}", "response": "answer"}):
        with pytest.raises(CorpusError, match="no column 'key'"):
            _inspect(section(tmp_path, text="{question}", **settings))
    jsonl(tmp_path / "b.jsonl", b"{bad", {"q": 1})
    (tmp_path / "c.csv").write_text("q\n1\n")
    (tmp_path / "d.txt").write_text("a")
    for name, columns in (("b.jsonl", "q"), ("c.csv", "q"), ("d.txt", "text")):
        with pytest.raises(CorpusError, match=f"no column 'question'; it has: {columns}$"):
            _inspect(section(tmp_path / name, text="question"))


def test_a_key_that_only_some_lines_have_is_a_column(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"instruction": "a"}, {"instruction": "b", "input": "c"})
    assert _inspect(section(tmp_path, text="{instruction}\n{input}"))[0].columns == ("instruction", "input")


def test_needed_columns_of_all_fields() -> None:
    corpus = section("x", id="key", text="{a} {b}", prompt="{a}{c}", response="d")
    assert needed_columns(corpus) == ("key", "a", "b", "c", "d")
    assert needed_columns(section("x", messages="m", text="{a}")) == ("m",)
    with pytest.raises(RecipeError, match=r"corpus\.response: bad template"):
        needed_columns(section("x", prompt="a", response="{"))


def test_ids_that_are_neither_null_nor_unreadable(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"id": ["x", None, "y", "x"], "text": ["t"] * 4}, rows_per_group=2)
    jsonl(tmp_path / "b.jsonl", {"id": "y", "text": "t"}, b"{bad", {"id": 3, "text": None}, {"id": ["no"]}, {"id": ""})
    tables = [item.ids for item in _inspect(section(tmp_path, id="id")) if item.ids is not None]
    assert tables[0].schema.equals(IDS)
    assert [table.column("id").to_pylist() for table in tables] == [["x", "y", "x"], ["y", "3"]]
