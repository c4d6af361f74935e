"""The text of a row: a column or a template. And which part of a row is a prompt, which its response."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from finescope.config import CorpusSection
from finescope.corpus.chat import split_last_response
from finescope.errors import RecipeError

_FORBIDDEN = {".": "an attribute", "[": "an index", "]": "an index", "!": "a conversion", ":": "a format"}


class Renderer(Protocol):
    """Something that makes a text of some columns of a row."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        ...

    def render(self, table: pa.Table) -> list[str | None]:
        """A text for each row; None: there is nothing to make it of."""
        ...


@dataclass(frozen=True)
class Template:
    """A text with the values of columns in it: literals[0] + fields[0] + literals[1] + ... + literals[-1]."""

    literals: tuple[str, ...]  # one more than fields
    fields: tuple[str, ...]  # at least one

    @classmethod
    def parse(cls, source: str, name: str = "corpus.text") -> "Template":
        """Read a template such as "{instruction}\\n{output}"; without braces it is the name of a column.

        `{{` and `}}` are braces. `name` is the recipe's field, for the message.

        Raises:
            RecipeError: it is not a template; the message names the position.
        """
        if "{" not in source and "}" not in source:
            return cls(("", ""), (source,))
        literals, fields = [""], []
        for is_field, part in _scan(
            source, lambda at, why: RecipeError(f"{name}: bad template {source!r}, position {at}: {why}")
        ):
            if is_field:
                fields.append(part)
                literals.append("")
            else:
                literals[-1] += part
        if not fields:
            raise RecipeError(f"{name}: bad template {source!r}: it names no column, as in '{{instruction}}'")
        return cls(tuple(literals), tuple(fields))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it names, each once, in order of appearance."""
        return tuple(dict.fromkeys(self.fields))

    def render(self, table: pa.Table) -> list[str | None]:
        """The text of each row; see `render_row`. A column that the table lacks is null."""
        values = {
            name: table.column(name).to_pylist() if name in table.column_names else [None] * table.num_rows
            for name in self.columns
        }
        return [self._render(dict(zip(values, row, strict=True))) for row in zip(*values.values(), strict=True)]

    def render_row(self, row: Mapping[str, object]) -> str | None:
        """The text of one row without white space around it.

        None where the template is of one column and that is null. A null beside other columns is empty. Where all
        values are empty, so is the text, whatever stands between them.
        """
        return self._render({name: row.get(name) for name in self.columns})

    def _render(self, values: dict[str, object]) -> str | None:
        texts = {name: scalar_text(value) for name, value in values.items()}
        if len(texts) == 1 and None in texts.values():
            return None
        if not any(text is not None and text.strip() for text in texts.values()):
            return ""
        filled = (literal + (texts[field] or "") for literal, field in zip(self.literals[:-1], self.fields, strict=True))
        return ("".join(filled) + self.literals[-1]).strip()


@dataclass(frozen=True)
class MessagesPart:
    """The last response of a column of chat messages, or all that stands before it."""

    column: str
    is_response: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of messages."""
        return (self.column,)

    def render(self, table: pa.Table) -> list[str | None]:
        """The part of each row; None where there is no prompt with a response."""
        pairs = [split_last_response(value) for value in table.column(self.column).to_pylist()]
        return [None if pair is None else pair[int(self.is_response)] for pair in pairs]


def scalar_text(value: object) -> str | None:
    """A value as text: strings as they are, booleans as in JSON, other scalars as Python writes them; null is None."""
    assert not isinstance(value, list | dict | bytes), "rows with such a value are rejected where they are read"
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def prompt_and_response(section: CorpusSection, columns: Sequence[str]) -> tuple[Renderer, Renderer] | tuple[None, None]:
    """What makes the prompt and what makes the response of a row: as the recipe says, else by the columns' names.

    Recognised: Alpaca (instruction, input, output), prompt and completion or response, messages (OpenAI) and
    conversations (ShareGPT). (None, None): no such pair.

    Raises:
        RecipeError: corpus.prompt or corpus.response is not a template.
    """
    if section.prompt is not None and section.response is not None:
        return Template.parse(section.prompt, "corpus.prompt"), Template.parse(section.response, "corpus.response")
    if section.messages is not None:
        return MessagesPart(section.messages, False), MessagesPart(section.messages, True)
    present = set(columns)
    if {"instruction", "output"} <= present:
        prompt = "{instruction}\n{input}" if "input" in present else "instruction"
        return Template.parse(prompt), Template.parse("output")
    for response in ("completion", "response"):
        if {"prompt", response} <= present:
            return Template.parse("prompt"), Template.parse(response)
    for messages in ("messages", "conversations"):
        if messages in present:
            return MessagesPart(messages, False), MessagesPart(messages, True)
    return None, None


def _scan(source: str, error: Callable[[int, str], RecipeError]) -> Iterator[tuple[bool, str]]:
    """The parts of a template: (False, literal) and (True, column)."""
    at = 0
    while at < len(source):
        if source[at : at + 2] in ("{{", "}}"):
            yield False, source[at]
            at += 2
        elif source[at] == "{":
            end = source.find("}", at)
            if end < 0:
                raise error(at, "'{' is never closed; a brace that is text is written '{{'")
            yield True, _column_name(source, at + 1, end, error)
            at = end + 1
        elif source[at] == "}":
            raise error(at, "'}' closes nothing; a brace that is text is written '}}'")
        else:
            yield False, source[at]
            at += 1


def _column_name(source: str, start: int, end: int, error: Callable[[int, str], RecipeError]) -> str:
    name = source[start:end]
    for offset, char in enumerate(name):
        if char in _FORBIDDEN:
            raise error(
                start + offset, f"'{char}' asks for {_FORBIDDEN[char]}; only plain columns are allowed, as in '{{output}}'"
            )
        if char == "{":
            raise error(start + offset, "'{' inside braces")
    if not name.strip():
        raise error(start, "the braces name no column")
    return name
