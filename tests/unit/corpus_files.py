"""Small corpora on disk, and a tokenizer of words, for the corpus tests."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finescope.config import CorpusSection
from finescope.corpus.documents import Documents, read_documents
from finescope.corpus.files import common_directory, resolve
from finescope.corpus.units import inspect_file

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"


def section(path: Path | str | list[str], **settings: Any) -> CorpusSection:
    return CorpusSection.model_validate({"path": path if isinstance(path, list) else str(path), **settings})


def jsonl(path: Path, *lines: Any) -> Path:
    """Lines that are bytes are written as they are, everything else as JSON."""
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(path: Path, columns: dict[str, Any], rows_per_group: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def bad_strings(*values: bytes | None) -> pa.Array:
    """A string array of bytes that nobody has checked."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def word_tokenizer(words: str, chat_template: str | None = CHAT_TEMPLATE, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["[UNK]", *special.values(), *words.split()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)
    fast.chat_template = chat_template
    return fast


def read_all(corpus: CorpusSection, tokenizer: Any = None) -> list[Documents]:
    """The documents of each unit, the counts of `index` held against those of reading."""
    files = resolve(corpus)
    found = []
    for file in files:
        name = file.info.path.removeprefix(common_directory(files))
        for unit in inspect_file(file, corpus).documents.to_pylist():
            documents = read_documents(unit, corpus, name, tokenizer, None, "embed")
            assert documents.num_rows_in == unit["num_rows"] == documents.table.num_rows + documents.rejects.num_rows
            found.append(documents)
    return found


def texts(corpus: CorpusSection, tokenizer: Any = None) -> list[str]:
    return [text for documents in read_all(corpus, tokenizer) for text in documents.table.column("text").to_pylist()]


def reasons(corpus: CorpusSection, tokenizer: Any = None) -> list[tuple[int, str]]:
    """(row, reason) of each reject."""
    rows = [row for documents in read_all(corpus, tokenizer) for row in documents.rejects.to_pylist()]
    return [(row["row"], row["reason"]) for row in rows]
