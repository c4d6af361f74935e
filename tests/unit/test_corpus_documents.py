from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corpus_files import bad_strings, jsonl, parquet, read_all, reasons, section, texts, word_tokenizer
from tokenizers import normalizers

from finescope import schemas
from finescope.config_seeds import SeedFile
from finescope.corpus.documents import read_documents, read_seeds, read_selected, read_strings, read_texts, text_hash_id
from finescope.corpus.files import resolve
from finescope.corpus.units import inspect_file
from finescope.errors import CorpusError


def _units(corpus: Any) -> list[dict[str, Any]]:
    return [unit for file in resolve(corpus) for unit in inspect_file(file, corpus).documents.to_pylist()]


def test_ids_are_hashes_of_place_and_text_wherever_the_corpus_lies(tmp_path: Path) -> None:
    ids = []
    for place in ("here", "there/deep"):
        for name in ("a", "b"):
            parquet(tmp_path / place / f"{name}.parquet", {"text": ["x", "x", None, "y"]}, rows_per_group=2)
        found = read_all(section(tmp_path / place))
        ids.append([doc_id for documents in found for doc_id in documents.table.column("doc_id").to_pylist()])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 6, "equal texts in different places are different documents"
    assert ids[0][:2] == [text_hash_id("a.parquet", 0, 0, "x"), text_hash_id("a.parquet", 0, 1, "x")]
    assert ids[0][2] == text_hash_id("a.parquet", 1, 1, "y")
    assert all(len(doc_id) == 16 for doc_id in ids[0])


def test_ids_of_the_corpus_as_strings_and_null_ids_rejected(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": 7, "text": "a"}, {"id": None, "text": "b"}, {"text": "c"}, {"id": 9, "text": ""})
    corpus = section(path, id="id")
    documents = read_all(corpus)[0]
    assert documents.table.to_pylist() == [{"doc_id": "7", "row": 0, "text": "a"}]
    assert reasons(corpus) == [(1, "null_id"), (2, "null_id"), (3, "empty_text")]
    assert documents.rejects.schema.equals(schemas.REJECTS)
    assert documents.rejects.to_pylist()[2] == {
        "doc_id": "9",
        "step": "embed",
        "file": str(path),
        "row_group": 0,
        "row": 3,
        "reason": "empty_text",
        "detail": "",
    }


def test_long_texts_are_rejected_after_rendering(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"a": "x" * 6, "b": "y"}, {"a": "x", "b": "y" * 30})
    corpus = section(path, text="{a} {b}", max_characters=8)
    assert texts(corpus) == ["xxxxxx y"]
    assert reasons(corpus) == [(1, "too_long")]


def test_messages_are_rendered_or_rejected(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    path = jsonl(tmp_path / "a.jsonl", {"m": chat}, {"m": None}, {"m": []}, {"m": "no"}, {"m": [{"from": "gpt", "value": "x"}]})
    corpus = section(path, messages="m")
    tokenizer = word_tokenizer("x")
    assert texts(corpus, tokenizer) == ["<user> hi", "<assistant> x"]
    assert reasons(corpus, tokenizer) == [(1, "null_text"), (2, "empty_text"), (3, "bad_messages")]


def test_messages_in_parquet_that_are_not_utf8(tmp_path: Path) -> None:
    contents = bad_strings(b"fine", b"\xff", b"good")
    struct = pa.StructArray.from_arrays([pa.array(["user"] * 3), contents], ["role", "content"])
    parquet(tmp_path / "a.parquet", {"m": pa.ListArray.from_arrays([0, 1, 2, 3], struct)})
    corpus = section(tmp_path, messages="m")
    assert texts(corpus, word_tokenizer("x")) == ["<user> fine", "<user> good"]
    assert reasons(corpus, word_tokenizer("x")) == [(1, "not_utf8")]


def test_limit_reads_the_first_rows_of_a_unit(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"text": ["a", None, "c", "d"]})
    corpus = section(tmp_path)
    documents = read_documents(_units(corpus)[0], corpus, "a.parquet", None, 3, "sae")
    assert documents.table.column("text").to_pylist() == ["a", "c"]
    assert documents.num_rows_in == 3


def test_a_file_that_changes_after_the_index_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    corpus = section(path)
    unit = _units(corpus)[0]
    jsonl(path, {"text": "b"}, {"text": "c"})
    with pytest.raises(CorpusError, match="has changed"):
        read_documents(unit, corpus, "a.jsonl", None, None, "embed")
    path.unlink()
    with pytest.raises(CorpusError, match="is gone"):
        read_selected(unit, [0], corpus, None)


def test_selected_rows_carry_all_columns_in_the_order_asked_for(tmp_path: Path) -> None:
    columns = {
        "q": [" a", "b", "c", None],
        "score": [1, 2, 3, 4],
        "text": ["t"] * 4,
        "raw": bad_strings(b"x", b"y\xff", b"z", b""),
    }
    parquet(tmp_path / "a.parquet", columns)
    corpus = section(tmp_path, text="{q}")
    table = read_selected(_units(corpus)[0], [2, 0, 1], corpus, None)
    assert table.to_pylist() == [
        {"__row": 2, "q": "c", "source_score": 3, "source_text": "t", "raw": "z", "text": "c"},
        {"__row": 0, "q": " a", "source_score": 1, "source_text": "t", "raw": "x", "text": "a"},
        {"__row": 1, "q": "b", "source_score": 2, "source_text": "t", "raw": "y\ufffd", "text": "b"},
    ]


def test_selected_rows_do_not_carry_the_text_twice(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": " a ", "n": 1}, b"{bad", {"text": "b", "m": {"k": 2}})
    corpus = section(path)
    table = read_selected(_units(corpus)[0], [2, 0], corpus, None)
    assert table.to_pylist() == [
        {"__row": 2, "n": None, "m": {"k": 2}, "text": "b"},
        {"__row": 0, "n": 1, "m": None, "text": "a"},
    ]


def test_seeds_by_template_or_as_they_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", {"a": "x", "b": "y"}, b"", {"text": " z "}, {"a": "w"}, {"text": "v", "source": "s"})
    corpus = section("unused", text="{a}\n{b}")
    assert read_seeds(SeedFile(str(path)), corpus, None) == ["x\ny", "z", "w", "v"]


def test_seeds_of_messages(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "s.jsonl", {"m": [{"role": "user", "content": "x"}]}, {"text": "x"})
    corpus = section("unused", messages="m")
    assert read_seeds(SeedFile(str(path)), corpus, word_tokenizer("x")) == ["<user> x", "x"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((b"",), "holds no seed"),
        (({"text": "a"}, b"", {"text": " "}), "line 3: its text is empty"),
        (({"text": "a"}, b"{"), "line 2: not a JSON object"),
        ((b'{"text": "\xff"}',), "line 1: not a JSON object in UTF-8"),
        (({"other": 1},), r"line 1: expected q \(or text\), got other"),
        (({"q": ["a"]},), "line 1: 'q' is list where text is expected"),
    ],
)
def test_bad_seeds_name_file_and_line(tmp_path: Path, lines: tuple[Any, ...], message: str) -> None:
    path = jsonl(tmp_path / "s.jsonl", *lines)
    with pytest.raises(CorpusError, match=rf"s\.jsonl'.*{message}"):
        read_seeds(SeedFile(str(path)), section("unused", text="q"), None)


def test_seed_without_a_token_or_a_readable_file(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("x")
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    path = jsonl(tmp_path / "s.jsonl", {"text": "?"})
    with pytest.raises(CorpusError, match="line 1: its text is empty"):
        read_seeds(SeedFile(str(path)), section("unused"), tokenizer)
    with pytest.raises(CorpusError, match=r"seeds\.path: no file matches"):
        read_seeds(SeedFile(str(tmp_path / "none.jsonl")), section("unused"), None)
    cut = jsonl(tmp_path / "s.jsonl.gz", {"text": "a"})
    cut.write_bytes(cut.read_bytes()[:-6])
    with pytest.raises(CorpusError, match="cannot be read"):
        read_seeds(SeedFile(str(cut)), section("unused"), None)


def test_held_out_texts_of_several_formats(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"q": ["x", "y"], "a": ["1", None]}, rows_per_group=1)
    jsonl(tmp_path / "b.jsonl", {"text": "z"}, {"q": "w", "a": "2"})
    assert read_texts([str(tmp_path)], section("unused", text="{q} {a}")) == ["x 1", "y", "z", "w 2"]
    parquet(tmp_path / "c.parquet", {"q": ["x", ""]}, rows_per_group=1)
    with pytest.raises(CorpusError, match=r"c\.parquet', row 1: its text is empty"):
        read_texts([str(tmp_path / "c.parquet")], section("unused", text="q"))


def test_held_out_rows_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, b"{")
    with pytest.raises(CorpusError, match="row 1: bad_json"):
        read_texts([str(path)], section("unused"))
    cut = parquet(tmp_path / "b.parquet", {"text": ["a"]})
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(CorpusError, match="cannot be read"):
        read_strings([str(cut)])
    with pytest.raises(CorpusError, match="cannot be read"):
        read_strings([str(parquet(tmp_path / "c.parquet", {"text": bad_strings(b"\xff")}))])


def test_all_strings_of_evaluation_sets(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"question": ["q"], "choices": [["a", "b"]], "n": [3], "m": [{"k": "v"}]})
    place = "a.parquet, row 0"
    expected = [(f"{place}, question", "q"), (f"{place}, choices", "a"), (f"{place}, choices", "b"), (f"{place}, m", "v")]
    assert read_strings([str(tmp_path)]) == expected
    parquet(tmp_path / "a.parquet", {"task_id": [11, 12], "text": ["one", "two"]})
    assert read_strings([str(tmp_path)])[1] == ("a.parquet, row 1 (task_id 12), text", "two")
