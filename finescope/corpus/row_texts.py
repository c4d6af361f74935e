"""The text and the id of a row, as the recipe's corpus section says."""

from typing import TYPE_CHECKING

import pyarrow as pa

from finescope.config import CorpusSection
from finescope.corpus.chat import BadMessages, render_messages
from finescope.corpus.selection import Selection
from finescope.corpus.text import Template, scalar_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_columns(section: CorpusSection) -> tuple[str, ...]:
    """The columns that a document's text and id are made of.

    Raises:
        RecipeError: corpus.text is not a template.
    """
    text = (section.messages,) if section.messages is not None else Template.parse(section.text).columns
    return tuple(dict.fromkeys([*([section.id] if section.id else []), *text]))


def selection_of(section: CorpusSection, limit: int | None) -> Selection:
    """What is read of a unit to make its documents."""
    columns = text_columns(section)
    nested = frozenset([section.messages] if section.messages else [])
    return Selection(columns, text_columns=frozenset(columns) - nested, nested_columns=nested, limit=limit)


def ids_of(table: pa.Table, column: str) -> list[str | None]:
    """The ids in a column as strings; None: null or empty."""
    return [scalar_text(value) or None for value in table.column(column).to_pylist()]


def texts_of(
    table: pa.Table, section: CorpusSection, tokenizer: "PreTrainedTokenizerBase | None"
) -> list[tuple[str | None, str]]:
    """(text, problem) for each row.

    The text is None where it is null or cannot be made; problem says why messages are no messages, else "".

    Raises:
        CorpusError: the corpus has messages and the tokenizer no chat template.
    """
    if section.messages is None:
        return [(text, "") for text in Template.parse(section.text).render(table)]
    assert tokenizer is not None, "corpus.messages is rendered by the tokenizer's chat template"
    return [_chat_text(value, tokenizer) for value in table.column(section.messages).to_pylist()]


def _chat_text(value: object, tokenizer: "PreTrainedTokenizerBase") -> tuple[str | None, str]:
    if value is None:
        return None, ""
    try:
        return render_messages(value, tokenizer), ""
    except BadMessages as error:
        return None, str(error)
