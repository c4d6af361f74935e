"""A JSONL file in ranges gives what it gives whole, and a range is read without the rest of the file."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_files import jsonl, section
from hypothesis import given, settings
from hypothesis import strategies as st

from finescope import storage
from finescope.config import CorpusSection
from finescope.corpus import streams
from finescope.corpus.documents import read_documents, read_selected
from finescope.corpus.files import CorpusFile, resolve
from finescope.corpus.units import inspect_file, inspect_range, num_ranges

_LINES = st.lists(st.sampled_from([b"", b" ", b'{"text": "a"}', b'{"text": "%s"}' % (b"b" * 60), b"{bad", b'{"text": "\xff"}']))
MIB = 2**20


def in_ranges(path: Path, size: int, **more: Any) -> CorpusSection:
    """A corpus cut every `size` bytes."""
    return section(path, range_mib=size / MIB, **more)


def units_of(corpus: CorpusSection) -> list[dict[str, Any]]:
    (file,) = resolve(corpus)
    return inspect_file(file, corpus).documents.to_pylist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranges")


@settings(max_examples=60, deadline=None)
@given(_LINES, st.integers(2, 100), st.booleans(), st.booleans())
def test_every_line_is_in_the_range_in_which_it_begins(
    folder: Path, lines: list[bytes], size: int, last: bool, mark: bool
) -> None:
    data = (b"\xef\xbb\xbf" if mark else b"") + b"\n".join(lines) + (b"\n" if last else b"")
    plain, packed = folder / "a.jsonl", folder / "a.jsonl.gz"
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data))
    expected: dict[int, list[bytes]] = {}
    offset = 0
    for line in data.splitlines(keepends=True):
        content = line.removeprefix(b"\xef\xbb\xbf").strip() if offset == 0 else line.strip()
        if content:
            expected.setdefault(offset // size, []).append(content)
        offset += len(line)
    for path, compression in ((plain, None), (packed, "gzip")):
        units = units_of(in_ranges(path, size))
        assert [unit["row_group"] for unit in units] == list(range(len(units)))
        assert sum(unit["num_rows"] for unit in units) == sum(map(len, expected.values()))
        for unit in units:
            span = streams.Span(unit["start"], unit["bytes"])
            found = list(streams.iterate_lines(str(path), compression, span))
            assert [line.data for line in found] == expected.get(unit["row_group"], [])
            assert [line.row for line in found] == list(range(unit["num_rows"]))
            assert all(data[line.offset :].removeprefix(b"\xef\xbb\xbf").lstrip(b" ").startswith(line.data) for line in found)


def test_ranges_have_the_documents_of_the_whole_file(tmp_path: Path) -> None:
    rows = [{"id": str(at), "text": f"document {at} " + "x" * (at % 37)} for at in range(500)]
    path = jsonl(tmp_path / "a.jsonl", *rows[:100], b"{bad", *rows[100:])
    whole, cut = in_ranges(path, 10 * MIB, id="id"), in_ranges(path, 1000, id="id")
    (unit,) = units_of(whole)
    units = units_of(cut)
    assert unit["bytes"] == sum(one["bytes"] for one in units) == path.stat().st_size
    assert len(units) == -(-path.stat().st_size // 1000)
    expected = read_documents(unit, whole, "a", None, None, "embed").table
    found = [read_documents(one, cut, "a", None, None, "embed") for one in units]
    assert [row["doc_id"] for part in found for row in part.table.to_pylist()] == expected.column("doc_id").to_pylist()
    assert [row["text"] for part in found for row in part.table.to_pylist()] == expected.column("text").to_pylist()
    (reject,) = [row for part in found for row in part.rejects.to_pylist()]
    assert path.read_bytes()[int(reject["detail"].split(":")[0].removeprefix("byte ")) :].startswith(b"{bad\n")
    assert units[reject["row_group"]]["start"] <= path.read_bytes().index(b"{bad")
    selected = read_selected(units[3], [2, 0], cut, None)
    assert selected.column("text").to_pylist() == [found[3].table.column("text")[row].as_py() for row in (2, 0)]
    ids = [inspect_range(resolve(cut)[0], cut, number).ids for number in range(len(units))]
    assert [value for part in ids if part is not None for value in part.column("id").to_pylist()] == [row["id"] for row in rows]


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, int | None]]:
    """The ranges that are asked of the store; a whole file cannot be opened."""
    asked: list[tuple[int | None, int | None]] = []
    original = storage.read_bytes

    def reading(uri: str, start: int | None = None, end: int | None = None) -> bytes:
        asked.append((start, end))
        return original(uri, start, end)

    def refused(uri: str) -> Any:
        raise AssertionError(f"'{uri}' is opened as a whole")

    monkeypatch.setattr(storage, "read_bytes", reading)
    monkeypatch.setattr(storage, "open_input", refused)
    return asked


def test_only_the_range_is_read(tmp_path: Path, bytes_read: list[tuple[int, int]]) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"{at:087d}"} for at in range(1000)))
    corpus = in_ranges(path, 10_000)
    (file,) = resolve(corpus)
    assert num_ranges(file, corpus) == 10
    (unit,) = inspect_range(file, corpus, 7).documents.to_pylist()
    assert bytes_read == [(69_999, 80_000)]
    bytes_read.clear()
    assert read_documents(unit, corpus, "a", None, None, "embed").table.column("text")[0].as_py() == f"{700:087d}"
    assert bytes_read == [(70_000, 80_000)]


def test_a_compressed_file_is_decompressed_once_by_who_goes_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "a.jsonl.gz", *({"text": f"{at:087d}"} for at in range(1000)))
    corpus = in_ranges(path, 10_000)
    units = units_of(corpus)
    assert [(unit["start"], unit["num_rows"]) for unit in units] == [(10_000 * at, 100) for at in range(10)]
    opened: list[str] = []
    original: Callable[..., Any] = storage.open_input
    monkeypatch.setattr(storage, "open_input", lambda uri: opened.append(uri) or original(uri))

    def read(order: list[int]) -> int:
        opened.clear()
        for number in order:
            table = read_documents(units[number], corpus, "a", None, None, "embed").table
            assert table.column("text").to_pylist() == [f"{at:087d}" for at in range(100 * number, 100 * number + 100)]
        return len(opened)

    assert read(list(range(10))) == 1
    assert read([1, 3, 5, 9]) == 1, "one of two actors"
    assert read([9, 0, 4]) == 2, "back to the start, and on"


def test_a_replaced_file_is_not_read_from_what_was_open(tmp_path: Path) -> None:
    corpus = in_ranges(tmp_path / "a.jsonl.gz", 1000)
    for name in ("one", "another"):
        jsonl(tmp_path / "new.jsonl.gz", *({"text": f"{name} {at:080d}"} for at in range(100)))
        (tmp_path / "new.jsonl.gz").rename(tmp_path / "a.jsonl.gz")
        units = units_of(corpus)
        # The first file is left in the middle, and the second is read on from there.
        for unit in units[:3] if name == "one" else units[4:]:
            table = read_documents(unit, corpus, "a", None, None, "embed").table
            assert all(text.startswith(f"{name} ") for text in table.column("text").to_pylist())


def test_cut_gz_and_the_file_of_one_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl.gz", *({"text": json.dumps(at)} for at in range(5000)))
    path.write_bytes(path.read_bytes()[:-10])
    corpus = in_ranges(path, 1000)
    found = inspect_file(resolve(corpus)[0], corpus)
    assert (found.documents.num_rows, found.rejects.num_rows) == (0, 1), "units before the damage do not count either"
    long = in_ranges(jsonl(tmp_path / "b.jsonl", {"text": "x" * 5000}), 1000)
    assert [unit["num_rows"] for unit in units_of(long)] == [1, 0, 0, 0, 0, 0]
    assert num_ranges(CorpusFile(storage.info(str(path)), "csv", None), corpus) == 1, "a line end may be inside of quotes"
