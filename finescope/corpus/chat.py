"""Chat messages: the shapes they come in, their text by the model's chat template, the last response in them."""

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from finescope.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ShareGPT's names for the speakers; others stay as they are.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str


class BadMessages(ValueError):
    """A value that is not a list of chat messages, or one that the chat template refuses."""


def parse_messages(value: object) -> list[Message]:
    """Messages from a list of {role, content} or {from, value}, or from such a list as JSON text.

    Raises:
        BadMessages: it is neither; the message says what was found.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is a UnicodeError
        except (ValueError, RecursionError) as error:
            raise BadMessages(f"expected a list of messages, got a text that is not JSON: {error}") from error
    if not isinstance(value, list):
        raise BadMessages(f"expected a list of messages, got {type(value).__name__}")
    return [_message(item, index) for index, item in enumerate(value)]


def render_messages(value: object, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The messages as one text by the tokenizer's chat template; empty where all of them are.

    Raises:
        BadMessages: the value has another shape, or the template refuses the order of the roles.
        CorpusError: the tokenizer has no chat template.
    """
    messages = parse_messages(value)
    if not any(message.content.strip() for message in messages):
        return ""
    if tokenizer.chat_template is None:
        raise CorpusError("corpus.messages: the model's tokenizer has no chat template; give corpus.text instead")
    try:
        text = tokenizer.apply_chat_template([message._asdict() for message in messages], tokenize=False)
    except jinja2.TemplateError as error:
        raise BadMessages(f"refused by the chat template: {error}") from error
    assert isinstance(text, str)
    return text.strip()


def split_last_response(value: object) -> tuple[str, str] | None:
    """(prompt, response): the last assistant message and what stands before it; None where there is no such pair.

    A prompt of system and user messages is their contents with an empty line between; where the assistant spoke
    before, each turn has its role in front.
    """
    try:
        messages = parse_messages(value)
    except BadMessages:
        return None
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=0)
    before = messages[:last]
    response = messages[last].content.strip() if before else ""
    spoke = any(message.role == "assistant" for message in before)
    turns = [f"{message.role}: {message.content.strip()}" if spoke else message.content.strip() for message in before]
    prompt = "\n\n".join(turn for turn in turns if turn)
    return (prompt, response) if prompt and response else None


def _message(item: Any, index: int) -> Message:
    if not isinstance(item, dict):
        raise BadMessages(f"message {index}: expected an object, got {type(item).__name__}")
    role = item.get("role") or item.get("from")
    content = item.get("content") if item.get("role") else item.get("value")
    if not isinstance(role, str):
        raise BadMessages(f"message {index}: neither 'role' nor 'from' in {', '.join(map(str, item))}")
    return Message(_ROLES.get(role, role), _content(content, index))


def _content(content: Any, index: int) -> str:
    """Text of a message: a string, null, or a list of {type: text, text} parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise BadMessages(f"message {index}: its content is {type(content).__name__}, not text")
