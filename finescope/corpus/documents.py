"""Rows into documents: an id, a place and a text, or a reason why not."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from finescope import storage
from finescope.config import CorpusSection
from finescope.config_seeds import SeedFile
from finescope.corpus import rejects
from finescope.corpus.chat import BadMessages, render_messages
from finescope.corpus.checks import ROW, replace_bad_utf8
from finescope.corpus.files import CorpusFile, format_of, resolve_paths
from finescope.corpus.lines import parse_line
from finescope.corpus.reading import num_row_groups, read_rows
from finescope.corpus.rejects import Reject, RowsRead, rejects_table
from finescope.corpus.row_texts import ids_of, selection_of, texts_of
from finescope.corpus.selection import Selection
from finescope.corpus.streams import Span, is_damage, iterate_lines
from finescope.corpus.text import Template
from finescope.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT = pa.schema([("doc_id", pa.string()), ("row", pa.int32()), ("text", pa.string())])
# Columns of `curated` that are not the source's: a source column of the same name is carried as `source_NAME`.
_RESERVED = ("rank", "doc_id", "score", "seed", "text")


@dataclass(frozen=True)
class Documents:
    """The documents of one unit."""

    table: pa.Table  # DOCUMENT, in order of row
    rejects: pa.Table  # schemas.REJECTS
    num_rows_in: int  # table.num_rows + rejects.num_rows


def read_documents(
    unit: Mapping[str, Any],
    section: CorpusSection,
    file_name: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    limit: int | None,
    step: str,
) -> Documents:
    """The documents of one unit: a row of schemas.DOCUMENTS.

    Args:
        file_name: the file's name below the corpus's `files.common_directory`, which goes into ids that are hashes.
        tokenizer: needed where section.messages is given, for its chat template.
        limit: the unit's first rows that are read; None: all.
        step: the name of the step that the rejects are written for.

    Raises:
        CorpusError: the file is gone or has changed since it was indexed.
    """
    storage.check_unchanged(unit["file"], unit["etag"])
    expected = unit["num_rows"] if limit is None else min(unit["num_rows"], limit)
    if expected == 0:
        return Documents(DOCUMENT.empty_table(), rejects_table([], step, unit["file"], unit["row_group"]), 0)
    format, compression = format_of(unit["file"], section.format)
    read = read_rows(unit["file"], format, compression, unit["row_group"], _span(unit), selection_of(section, limit))
    documents, rejected = _documents(read, section, (file_name, unit["row_group"]), tokenizer)
    assert read.num_rows == expected == documents.num_rows + len(rejected), (unit, read.num_rows, documents.num_rows)
    return Documents(documents, rejects_table(rejected, step, unit["file"], unit["row_group"]), expected)


def read_selected(
    unit: Mapping[str, Any], rows: Sequence[int], section: CorpusSection, tokenizer: "PreTrainedTokenizerBase | None"
) -> pa.Table:
    """All source columns of some documents of a unit, in the order of `rows`: `__row` int64 first, `text` last.

    A source column whose name `curated` needs is carried as `source_NAME`; one that is the text already is not
    carried twice. Bytes that are not UTF-8, in columns that the text is not made of, become U+FFFD.

    Raises:
        CorpusError: the file is gone or has changed since it was indexed.
    """
    storage.check_unchanged(unit["file"], unit["etag"])
    format, compression = format_of(unit["file"], section.format)
    needed = selection_of(section, None)
    wanted = Selection(None, needed.text_columns, needed.nested_columns, rows=frozenset(rows))
    table = read_rows(unit["file"], format, compression, unit["row_group"], _span(unit), wanted).table
    order = np.searchsorted(table.column(ROW).to_numpy(), np.asarray(rows, dtype=np.int64))
    table = replace_bad_utf8(table.take(pa.array(order)))
    assert table.column(ROW).to_pylist() == list(rows), "rows that were documents when the unit was embedded"
    texts = [text for text, _ in texts_of(table, section, tokenizer)]
    if section.messages is None and section.text in ("text", "{text}"):
        table = table.drop_columns(["text"])
    table = table.rename_columns([f"source_{name}" if name in _RESERVED else name for name in table.column_names])
    return table.append_column("text", pa.array(texts, pa.string()))


def read_seeds(seeds: SeedFile, corpus: CorpusSection, tokenizer: "PreTrainedTokenizerBase | None") -> list[str]:
    """The seeds' texts, by the corpus's template; a row without its columns that has `text` is taken as it is.

    Args:
        tokenizer: finds seeds without a token, and renders messages; None: neither is looked at.

    Raises:
        CorpusError: no file, no row, or a row that is not a seed; the message names file and line.
    """
    texts: list[str] = []
    files = resolve_paths((seeds.path,), "jsonl", seeds.key)
    for file in files:
        try:
            lines = list(iterate_lines(file.info.path, file.compression))
        except OSError as error:
            if not is_damage(error):
                raise
            raise CorpusError(f"'{file.info.path}' cannot be read: {error}") from error
        for line in lines:
            place = f"'{file.info.path}', line {line.number}"
            try:
                row = parse_line(line.data)
            except ValueError as error:
                raise CorpusError(f"{place}: not a JSON object in UTF-8: {error}") from error
            texts.append(_text(row, corpus, tokenizer, place))
    if not texts:
        raise CorpusError(f"{seeds.key}: '{seeds.path}' holds no seed")
    return texts


def read_texts(paths: Sequence[str], corpus: CorpusSection, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[str]:
    """The texts of held-out sets in any supported format, by the rules of `read_seeds`.

    Raises:
        CorpusError: no file, or a row that cannot be read or has no text; the message names file and row.
    """
    texts: list[str] = []
    for file in resolve_paths(paths, "auto", "evaluate"):
        for row in _all_rows(file):
            texts.append(_text(row, corpus, tokenizer, f"'{file.info.path}', row {row[ROW]}"))
    return texts


def read_row_strings(paths: Sequence[str], format: Literal["auto", "jsonl"], key: str) -> list[str]:
    """All strings of each row, joined: what a set is about, whatever its columns are called. `key` names the paths in errors.

    Raises:
        CorpusError: no file, or a row that cannot be read; the message names file and row.
    """
    return ["\n".join(_strings(row)) for file in resolve_paths(paths, format, key) for row in _all_rows(file)]


def read_strings(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Every string of every column of evaluation sets, whatever their columns are called, each after the place where it
    stands: "gsm8k.parquet, row 3 (id test-3), question". For decontamination.

    Raises:
        CorpusError: no file, or a row that cannot be read; the message names file and row.
    """
    found: list[tuple[str, str]] = []
    for file in resolve_paths(paths, "auto", "curate.decontaminate"):
        for row in _all_rows(file):
            named = [name for name in row if name == "id" or name.endswith("_id")]
            shown = f" ({named[0]} {row[named[0]]})" if named else ""
            place = f"{file.info.path.rsplit('/', 1)[-1]}, row {row[ROW]}{shown}"
            for name, value in row.items():
                if name not in (ROW, *named[:1]):
                    found.extend((f"{place}, {name}", text) for text in _strings(value))
    return found


def text_hash_id(file_name: str, row_group: int, row: int, text: str) -> str:
    """The id of a document in a corpus without ids: 16 hex digits."""
    return hashlib.blake2b(f"{file_name}\0{row_group}\0{row}\0{text}".encode(), digest_size=8).hexdigest()


def _span(unit: Mapping[str, Any]) -> Span | None:
    # `start` is younger than other columns: what an older index lists is read whole.
    return None if unit.get("start") is None else Span(unit["start"], unit["bytes"])


def _documents(
    read: RowsRead, section: CorpusSection, place: tuple[str, int], tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[pa.Table, list[Reject]]:
    """Documents (DOCUMENT) of rows that were read, and all rejects; `place` is the unit's (file name, row group)."""
    rows: list[int] = read.table.column(ROW).to_pylist()
    ids = [None] * len(rows) if section.id is None else ids_of(read.table, section.id)
    rejected = list(read.rejects)
    kept: list[tuple[str, int, str]] = []
    for row, doc_id, (text, problem) in zip(rows, ids, texts_of(read.table, section, tokenizer), strict=True):
        reason, detail = _reason(section, doc_id, text, problem)
        if reason is not None:
            rejected.append(Reject(row, reason, detail, doc_id))
        else:
            assert text is not None
            kept.append((doc_id or text_hash_id(*place, row, text), row, text))
    columns = zip(*kept, strict=True) if kept else ((), (), ())
    return pa.table([pa.array(list(c), f.type) for c, f in zip(columns, DOCUMENT, strict=True)], schema=DOCUMENT), rejected


def _reason(section: CorpusSection, doc_id: str | None, text: str | None, problem: str) -> tuple[str | None, str]:
    """Why a row is no document, and the detail; (None, "") where it is one."""
    if section.id is not None and doc_id is None:
        return rejects.NULL_ID, f"'{section.id}' is null or empty"
    if problem:
        return rejects.BAD_MESSAGES, problem
    if text is None:
        return rejects.NULL_TEXT, f"'{section.messages or section.text}' is null"
    if not text:
        return rejects.EMPTY_TEXT, ""
    if len(text) > section.max_characters:
        return rejects.TOO_LONG, f"{len(text):,} characters; corpus.max_characters is {section.max_characters:,}"
    return None, ""


def _all_rows(file: CorpusFile) -> list[dict[str, Any]]:
    """All rows of a file, `__row` counted over its row groups; raises CorpusError where one cannot be read."""
    path = file.info.path
    rows: list[dict[str, Any]] = []
    try:
        for row_group in range(num_row_groups(path, file.format)):
            read = read_rows(path, file.format, file.compression, row_group, None, Selection())
            if read.rejects:
                first = read.rejects[0]
                raise CorpusError(f"'{path}', row {len(rows) + (first.row or 0)}: {first.reason}: {first.detail}")
            rows += [{**row, ROW: len(rows) + row[ROW]} for row in read.table.to_pylist()]
    except (OSError, ValueError) as error:
        if not (is_damage(error) or isinstance(error, UnicodeDecodeError)):
            raise
        raise CorpusError(f"'{path}' cannot be read: {error}") from error
    return rows


def _text(row: dict[str, Any], corpus: CorpusSection, tokenizer: "PreTrainedTokenizerBase | None", place: str) -> str:
    """The text of one row, which must have one."""
    template = Template.parse(corpus.text)
    columns = (corpus.messages,) if corpus.messages is not None else template.columns
    present = [name for name in columns if row.get(name) is not None]
    if not present and row.get("text") is not None:
        template, present = Template.parse("text"), ["text"]
    if not present:
        given = ", ".join(name for name in row if name != ROW) or "nothing"
        raise CorpusError(f"{place}: expected {' or '.join(columns)} (or text), got {given}")
    if present == [corpus.messages]:
        assert tokenizer is not None, "corpus.messages is rendered by the tokenizer's chat template"
        try:
            text = render_messages(row[present[0]], tokenizer)
        except BadMessages as error:
            raise CorpusError(f"{place}: {error}") from error
    else:
        nested = [name for name in present if isinstance(row[name], list | dict | bytes)]
        if nested:
            raise CorpusError(f"{place}: '{nested[0]}' is {type(row[nested[0]]).__name__} where text is expected")
        text = template.render_row(row)
    if not text or (tokenizer is not None and not tokenizer(text, add_special_tokens=False)["input_ids"]):
        raise CorpusError(f"{place}: its text is empty")
    return text


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []
