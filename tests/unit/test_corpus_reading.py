import gzip
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import bad_strings, jsonl, parquet, read_all, reasons, section, texts

from finescope.corpus.documents import read_selected
from finescope.corpus.files import resolve
from finescope.corpus.reading import concat_rows, read_rows
from finescope.corpus.selection import Selection
from finescope.corpus.units import inspect_file
from finescope.errors import CorpusError


def test_jsonl_rejects_every_bad_line_and_counts_no_blank_one(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + b'{"text": "first"}',
        b"",
        b"{broken",
        b'{"text": "caf\xe9"}',
        b"[1]",
        {"text": ["a", "b"]},
        {"text": {"a": 1}},
        b'{"text": "\\ud800"}',
        b"   \t",
        {"text": 7},
        {"text": None},
        {"other": 1},
        {"text": "  "},
        b"[" * 100_000,
        {"text": "last"},
    )
    corpus = section(path)
    assert texts(corpus) == ["first", "7", "last"]
    assert reasons(corpus) == [
        (1, "bad_json"),
        (2, "not_utf8"),
        (3, "bad_json"),
        (4, "not_text"),
        (5, "not_text"),
        (6, "not_utf8"),
        (8, "null_text"),
        (9, "null_text"),
        (10, "empty_text"),
        (11, "bad_json"),
    ]
    details = read_all(corpus)[0].rejects.column("detail").to_pylist()
    assert details[0].startswith("line 3: "), "the line that an editor shows, blank ones counted"
    assert details[3] == "line 6: 'text' is a list"


def test_jsonl_columns_of_mixed_types_become_strings(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"x": 1, "n": {"a": [1]}, "e": {}}, {"x": "one", "y": True}, {"x": [1, "é"]})
    read = read_rows(str(path), "jsonl", None, 0, None, Selection())
    assert read.table.column_names == ["__row", "x", "n", "e", "y"]
    assert read.table.to_pylist() == [
        {"__row": 0, "x": "1", "n": {"a": [1]}, "e": "{}", "y": None},
        {"__row": 1, "x": "one", "n": None, "e": None, "y": True},
        {"__row": 2, "x": '[1, "é"]', "n": None, "e": None, "y": None},
    ]


def test_columns_limit_and_rows_select(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "a.jsonl", *({"a": i, "b": -i} for i in range(5)))
    groups = parquet(tmp_path / "a.parquet", {"a": list(range(5)), "b": [-i for i in range(5)]})
    (tmp_path / "a.csv").write_text("a,b\n" + "".join(f"{i},{-i}\n" for i in range(5)))
    for path, format in ((lines, "jsonl"), (groups, "parquet"), (tmp_path / "a.csv", "csv")):
        read = read_rows(str(path), format, None, 0, None, Selection(("b",), limit=4, rows=frozenset([1, 3, 4])))
        assert read.table.column("__row").to_pylist() == [1, 3]
        assert [int(value) for value in read.table.column("b").to_pylist()] == [-1, -3]
        assert read.num_rows == 2


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_lines_are_read(tmp_path: Path, suffix: str) -> None:
    data = b'{"text": "one"}\n{"text": "two"}'
    packed = gzip.compress(data) if suffix == "gz" else pa.compress(data, "zstd", asbytes=True)
    fsspec.filesystem("memory").pipe({f"/corpus-reading/a.jsonl.{suffix}": packed})
    assert texts(section(f"memory://corpus-reading/a.jsonl.{suffix}")) == ["one", "two"]


def test_csv_counts_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    data = '\ufeffid,text\n1,one\n\n2,"two\nlines"\n3,x,y\n4\n5,five\n6,\n'.encode() + b"7,caf\xe9\n8,eight\n"
    (tmp_path / "a.csv").write_bytes(data)
    corpus = section(tmp_path / "a.csv", id="id")
    assert texts(corpus) == ["one", "two\nlines", "five", "eight"]
    assert reasons(corpus) == [(2, "bad_csv"), (3, "bad_csv"), (5, "empty_text"), (6, "not_utf8")]
    documents = read_all(corpus)[0]
    assert documents.table.column("doc_id").to_pylist() == ["1", "2", "5", "8"]
    assert documents.table.column("row").to_pylist() == [0, 1, 4, 7]
    assert documents.rejects.column("doc_id").to_pylist() == [None, None, "6", None]


def test_csv_without_rows_or_with_one_name_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("text\n")
    assert texts(section(tmp_path)) == []
    (tmp_path / "c.csv").write_text("text,text\na,b\n")
    with pytest.raises(CorpusError, match="two columns of one name"):
        texts(section(tmp_path / "c.csv"))


def test_txt_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffline one\n\nline two\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text(" \n")
    corpus = section(tmp_path)
    assert texts(corpus) == ["line one\n\nline two"]
    assert reasons(corpus) == [(0, "not_utf8"), (0, "empty_text")]


def test_parquet_rejects_by_row_group(tmp_path: Path) -> None:
    text = bad_strings(b"zero", b"\xff", None, b" ", b"four", b"five")
    path = parquet(tmp_path / "a.parquet", {"text": text, "unread": bad_strings(*[b"\xfe"] * 6)}, rows_per_group=3)
    corpus = section(path)
    assert texts(corpus) == ["zero", "four", "five"]
    assert reasons(corpus) == [(1, "not_utf8"), (2, "null_text"), (0, "empty_text")]


def test_parquet_text_in_other_types(tmp_path: Path) -> None:
    for number, column in enumerate(
        [
            pa.array([b"a", b"\xff", None], pa.binary()),
            pa.array(["a", "b", None], pa.large_string()),
            pa.array(["a", "b", None]).dictionary_encode(),
            pa.array([1.5, 2.0, None]),
            pa.array([True, False, None]),
            pa.array([["a"], [], None]),
        ]
    ):
        parquet(tmp_path / f"{number}.parquet", {"text": column})
    found = [(texts(section(path)), reasons(section(path))) for path in sorted(tmp_path.iterdir())]
    assert found == [
        (["a"], [(1, "not_utf8"), (2, "null_text")]),
        (["a", "b"], [(2, "null_text")]),
        (["a", "b"], [(2, "null_text")]),
        (["1.5", "2.0"], [(2, "null_text")]),
        (["true", "false"], [(2, "null_text")]),
        ([], [(0, "not_text"), (1, "not_text"), (2, "null_text")]),
    ]


def test_parquet_damaged_page_rejects_its_row_group_only(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": [f"document {i}" for i in range(20)]}, rows_per_group=10)
    offset = pq.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    corpus = section(path)
    assert texts(corpus) == [f"document {i}" for i in range(10, 20)]
    assert reasons(corpus) == [(i, "unreadable_row_group") for i in range(10)]


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["a"], "big": ["b"]})
    assert read_rows(str(path), "parquet", None, 0, None, Selection(("text",))).table.column_names == ["__row", "text"]


def test_reserved_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="__row"):
        read_rows(str(parquet(tmp_path / "a.parquet", {"__row": [1]})), "parquet", None, 0, None, Selection())


def test_concat_widens_and_falls_back_to_strings() -> None:
    tables = [pa.table({"a": [1], "b": [1], "c": ["x"]}), pa.table({"a": [0.5], "b": ["x"]}), pa.table({"b": [[1, 2]]})]
    assert concat_rows(tables).to_pylist() == [
        {"a": 1.0, "b": "1", "c": "x"},
        {"a": 0.5, "b": "x", "c": None},
        {"a": None, "b": "[1, 2]", "c": None},
    ]


def test_concat_takes_no_integer_for_a_double_that_cannot_hold_it() -> None:
    tables = [pa.table({"a": [2**60], "b": [2**53]}), pa.table({"a": [0.5], "b": [0.5]})]
    assert concat_rows(tables).to_pylist() == [{"a": str(2**60), "b": float(2**53)}, {"a": "0.5", "b": 0.5}]


def test_text_of_a_row_does_not_depend_on_the_rows_beside_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"n": 1}, {"n": 0.5}, {"n": True}, {"n": None}, {"n": 2**70}, {"n": 1e22}, {"n": "x"})
    corpus, expected = section(path, text="n"), ["1", "0.5", "true", str(2**70), "1e+22", "x"]
    assert texts(corpus) == expected
    numbers = section(jsonl(tmp_path / "b.jsonl", {"n": 1, "id": 1}, {"n": 0.5, "id": 2.5}), text="{n}", id="id")
    (documents,) = read_all(numbers)
    assert documents.table.select(["doc_id", "text"]).to_pylist() == [
        {"doc_id": "1", "text": "1"},
        {"doc_id": "2.5", "text": "0.5"},
    ]
    (file,) = resolve(numbers)
    (unit,) = inspect_file(file, numbers).documents.to_pylist()
    assert read_selected(unit, [0], numbers, None).select(["id", "text"]).to_pylist() == [{"id": "1", "text": "1"}]
