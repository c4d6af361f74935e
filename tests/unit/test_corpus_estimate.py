import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import jsonl, parquet, section

from finescope import storage
from finescope.corpus import shapes
from finescope.corpus.estimate import estimate
from finescope.corpus.files import resolve
from finescope.corpus.units import inspect_file
from finescope.errors import CorpusError


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)
    return [{"text": " ".join(map(str, random.integers(0, 10_000, size=40)))} for _ in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv"])
def test_heads_of_large_files_are_scaled_to_all(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        path = tmp_path / f"{number}.{kind}"
        data = rows(1000 * (1 + number % 2), number)
        if kind == "csv":
            path.write_text("text\n" + "".join(row["text"] + "\n" for row in data))
        else:
            jsonl(path, *data)
    corpus = section(tmp_path)
    exact = [unit for file in resolve(corpus) for unit in inspect_file(file, corpus).documents.to_pylist()]
    monkeypatch.setattr(shapes, "_HEAD_BYTES", 2**16)
    asked: list[int] = []
    original: Any = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, start, end: asked.append(end - start) or original(uri, start, end))
    documents, size = estimate(resolve(corpus), corpus)
    assert documents == pytest.approx(sum(unit["num_rows"] for unit in exact), rel=0.05)
    assert size == pytest.approx(sum(unit["bytes"] for unit in exact), rel=0.05)
    assert len(asked) == 8
    assert max(asked) <= 2**16, "no file is read through"


def test_small_files_are_counted(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"text": ["x"] * 7}, rows_per_group=3)
    jsonl(tmp_path / "b.jsonl", {"text": "x"}, b"", {"text": "y"})
    (tmp_path / "c.txt").write_text("x")
    (tmp_path / "d.csv").write_text("text\na\nb\n")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "z"}).encode()))
    corpus = section(tmp_path)
    assert estimate(resolve(corpus), corpus)[0] == 7 + 2 + 1 + 2 + 1


def test_a_file_that_cannot_be_read_counts_nothing_and_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    corpus = section(tmp_path)
    assert estimate(resolve(corpus), corpus) == (0, 0)
    jsonl(tmp_path / "b.jsonl", {"words": "x"})
    with pytest.raises(CorpusError, match=r"has no column 'text'; it has: words"):
        estimate(resolve(corpus), corpus)
