import pyarrow as pa
import pytest
from corpus_files import section, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from finescope.corpus.chat import BadMessages, parse_messages, render_messages, split_last_response
from finescope.corpus.text import Template, prompt_and_response, scalar_text
from finescope.errors import CorpusError, RecipeError


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("text", {"text": "  a  b \n"}, "a  b"),
        ("{text}", {"text": None}, None),
        ("text", {"other": 1}, None),
        ("{a}\n{b}\n{c}", {"a": "x", "b": None, "c": "z"}, "x\n\nz"),
        ("{a}\n{b}", {"a": "x", "b": ""}, "x"),
        ("Question: {a}\nAnswer: {b}", {"a": " ", "b": None}, ""),
        ("Question: {a}", {"a": 0}, "Question: 0"),
        ("{{{a}}} {{}}", {"a": True}, "{true} {}"),
        ("{a}{a}", {"a": "x"}, "xx"),
        ("{a b}", {"a b": 1.0}, "1.0"),
    ],
)
def test_template_renders(template: str, row: dict[str, object], text: str | None) -> None:
    assert Template.parse(template).render_row(row) == text
    assert Template.parse(template).render(pa.Table.from_pylist([row, row])) == [text] * 2


@pytest.mark.parametrize(
    ("template", "position", "why"),
    [
        ("ab {c", 3, "never closed"),
        ("ab c}", 4, "closes nothing"),
        ("{}", 1, "no column"),
        ("{a} { }", 5, "no column"),
        ("{a.b}", 2, "attribute"),
        ("{a[0]}", 2, "index"),
        ("{a!r}", 2, "conversion"),
        ("{a:>3}", 2, "format"),
        ("{a{b}}", 2, "inside"),
    ],
)
def test_bad_template_is_named_with_its_position(template: str, position: int, why: str) -> None:
    with pytest.raises(RecipeError, match=rf"corpus\.text: bad template .*, position {position}: .*{why}"):
        Template.parse(template)


def test_template_without_a_column_is_bad() -> None:
    with pytest.raises(RecipeError, match=r"corpus\.prompt: .*names no column"):
        Template.parse("{{a}}", "corpus.prompt")


_VALUES = st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=8), st.integers(-9, 9), st.booleans())


@settings(max_examples=60)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), _VALUES, _VALUES)
def test_literals_and_values_come_through_unchanged(literal: str, first: object, second: object) -> None:
    escaped = literal.replace("{", "{{").replace("}", "}}")
    template = Template.parse("{a}" + escaped + "{b}")
    assert template.columns == ("a", "b")
    rendered = template.render_row({"a": first, "b": second})
    values = [scalar_text(first) or "", scalar_text(second) or ""]
    expected = literal.join(values).strip() if any(value.strip() for value in values) else ""
    assert rendered == expected


def test_messages_in_their_shapes() -> None:
    tokenizer = word_tokenizer("x")
    expected = "<user> hi\n<assistant> there"
    for value in (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there", "tool_calls": None}],
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "there"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "there"}],
        '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]',
    ):
        assert render_messages(value, tokenizer) == expected
    assert render_messages([], tokenizer) == render_messages([{"role": "user", "content": " "}], tokenizer) == ""


@pytest.mark.parametrize(
    "value",
    [
        "not json",
        "3",
        3,
        {"role": "user"},
        [3],
        [{"content": "x"}],
        [{"role": "user", "content": 3}],
        '["\\ud800"]',
        '[["\\ud800"]]',
    ],
)
def test_what_is_no_messages(value: object) -> None:
    with pytest.raises(BadMessages):
        parse_messages(value)


def test_chat_template_may_refuse_or_be_missing() -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(BadMessages, match="roles must alternate"):
        render_messages(messages, word_tokenizer("x", "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(CorpusError, match="no chat template"):
        render_messages(messages, word_tokenizer("x", None))


def test_last_response_and_what_stands_before_it() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": " a "}]
    assert split_last_response(turns) == ("s\n\nq", "a")
    more = [*turns, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert split_last_response(more) == ("system: s\n\nuser: q\n\nassistant: a\n\nuser: r", "b")
    assert split_last_response(turns[:2]) is None
    assert split_last_response(turns[2:]) is None
    assert split_last_response("no") is None


@pytest.mark.parametrize(
    ("fields", "row", "expected"),
    [
        ({}, {"instruction": "i", "input": "n", "output": "o"}, ("i\nn", "o")),
        ({}, {"instruction": "i", "output": "o"}, ("i", "o")),
        ({}, {"prompt": "p", "completion": "c", "text": "t"}, ("p", "c")),
        ({}, {"prompt": "p", "response": "c"}, ("p", "c")),
        ({"prompt": "Q: {q}", "response": "a"}, {"instruction": "i", "output": "o", "q": "x", "a": "y"}, ("Q: x", "y")),
        ({}, {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]}, ("u", "v")),
        ({"messages": "m"}, {"m": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "v"}]}, ("u", "v")),
        ({}, {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "v"}]}, ("u", "v")),
    ],
)
def test_prompt_and_response_are_recognised(fields: dict[str, str], row: dict[str, object], expected: tuple[str, str]) -> None:
    prompt, response = prompt_and_response(section("x", **fields), list(row))
    assert prompt is not None
    assert response is not None
    table = pa.Table.from_pylist([row])
    assert (prompt.render(table), response.render(table)) == ([expected[0]], [expected[1]])
    assert set(prompt.columns) | set(response.columns) <= set(row)


def test_no_prompt_in_plain_text() -> None:
    assert prompt_and_response(section("x"), ["text", "prompt", "instruction"]) == (None, None)
