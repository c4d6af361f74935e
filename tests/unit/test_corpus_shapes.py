"""Shapes of rows that are recognised, and what wins over them."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from corpus_files import jsonl, parquet, section, texts, word_tokenizer

from finescope.config import CorpusSection
from finescope.corpus.estimate import estimate
from finescope.corpus.files import resolve
from finescope.corpus.shapes import SHAPES, columns_of, recognise, shaped
from finescope.corpus.text import prompt_and_response
from finescope.corpus.units import inspect_file

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def read_as(corpus: CorpusSection) -> CorpusSection:
    return shaped(corpus, recognise(corpus, resolve(corpus)))


@pytest.mark.parametrize(
    ("row", "name", "text"),
    [
        ({"instruction": "add", "input": "1 2", "output": "3"}, "Alpaca", "add\n1 2\n3"),
        ({"instruction": "add", "input": "", "output": "3"}, "Alpaca", "add\n\n3"),
        ({"instruction": "add", "output": "3"}, "Alpaca", "add\n3"),
        ({"prompt": "q", "completion": "a", "n": 1}, "prompt and completion", "q\na"),
        ({"prompt": "q", "response": "a"}, "prompt and response", "q\na"),
        ({"messages": TURNS}, "messages", "<user> q\n<assistant> a"),
        ({"conversations": SHARED}, "ShareGPT", "<user> q\n<assistant> a"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_shapes_are_recognised_with_their_prompt_and_response(
    tmp_path: Path, row: dict[str, Any], name: str, text: str, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet(path, {column: [value] for column, value in row.items()})
    else:
        jsonl(path, row)
    corpus = section(tmp_path)
    shape = recognise(corpus, resolve(corpus))
    assert shape is not None
    assert shape.name == name
    assert texts(read_as(corpus), word_tokenizer("x")) == [text]
    prompt, response = prompt_and_response(read_as(corpus), list(row))
    assert prompt is not None
    assert response is not None


def test_shapes_agree_with_prompt_and_response() -> None:
    for shape in SHAPES:
        prompt, response = prompt_and_response(section("x"), shape.columns)
        assert prompt is not None
        assert response is not None
        assert {*prompt.columns, *response.columns} == set(shape.columns)


@pytest.mark.parametrize(
    "fields", [{"text": "{output}"}, {"text": "output"}, {"messages": "m"}, {"text": "{instruction} {output}"}]
)
def test_what_the_recipe_says_wins(tmp_path: Path, fields: dict[str, str]) -> None:
    jsonl(tmp_path / "a.jsonl", {"instruction": "i", "output": "o", "m": TURNS})
    assert read_as(section(tmp_path, **fields)) == section(tmp_path, **fields)


def test_a_column_text_wins_and_unknown_columns_stay(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"instruction": "i", "output": "o", "text": "t"})
    assert texts(read_as(section(tmp_path))) == ["t"]
    other = jsonl(tmp_path / "b.jsonl", {"question": "i"})
    assert read_as(section(other)) == section(other)


def test_the_first_file_that_can_be_read_decides(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not Parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "c.jsonl").write_bytes(b"{bad\n")
    large = b"\n".join(json.dumps({"prompt": str(at) * 50, "completion": "a"}).encode() for at in range(20_000))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(large, 1))
    corpus = section(tmp_path)
    shape = recognise(corpus, resolve(corpus))
    assert shape is not None
    assert shape.name == "prompt and completion"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_first_line_that_is_longer_than_a_head_is_read_to_its_end(tmp_path: Path, name: str) -> None:
    letters = random.Random(0).randbytes(3 << 20).hex()
    row = {"instruction": letters, "output": "o"}
    corpus = section(jsonl(tmp_path / name, row, {**row, "instruction": "short"}))
    (file,) = resolve(corpus)
    assert columns_of(file) == ("instruction", "output")
    assert read_as(corpus).text == "{instruction}\n{output}"
    assert estimate([file], read_as(corpus))[0] >= 1


def test_a_csv_header_that_is_no_header_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,"' + b"x" * 200_000 + b"\n1,2\n")
    corpus = section(path)
    (file,) = resolve(corpus)
    assert columns_of(file) == ()
    assert estimate([file], corpus) == (0, 0)
    (reject,) = inspect_file(file, corpus).rejects.to_pylist()
    assert (reject["reason"], reject["detail"]) == ("unreadable_file", "CSV header: field larger than field limit (131072)")
