"""Training examples: documents as tokens, and which of them are trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from finescope.errors import ModelError

SCHEMA = pa.schema([("tokens", pa.list_(pa.int32())), ("loss_start", pa.int32())])


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised document; what stands before `loss_start` is read and not trained on."""

    tokens: np.ndarray  # [length] int32
    loss_start: int  # first position whose token is a target; at least 1


@dataclass(frozen=True)
class Examples:
    """The examples of a set of documents, and what became of the others."""

    examples: tuple[Example, ...]
    truncated: int  # documents cut to max_tokens
    dropped: tuple[tuple[int, str], ...]  # (index among the documents, reason)


def build_examples(tokenizer: PreTrainedTokenizerBase, documents: Iterable[tuple[str | None, str]], max_tokens: int) -> Examples:
    """Tokenise (prompt, response) pairs; without a prompt the response is plain text and trained on from position 1.

    Raises:
        ModelError: the chat template does not keep the prompt as it is when the response follows.
    """
    examples: list[Example] = []
    dropped: list[tuple[int, str]] = []
    truncated = 0
    for index, (prompt, response) in enumerate(documents):
        ids, loss_start = _tokenise(tokenizer, prompt, response)
        truncated += len(ids) > max_tokens
        tokens = np.asarray(ids[:max_tokens], dtype=np.int32)
        if loss_start < len(tokens):
            examples.append(Example(tokens, loss_start))
        else:
            dropped.append((index, "fewer than two tokens" if prompt is None else "the prompt alone fills max_tokens"))
    return Examples(tuple(examples), truncated, tuple(dropped))


def to_table(examples: Sequence[Example]) -> pa.Table:
    """The examples as a table of `SCHEMA`."""
    return pa.table([[e.tokens for e in examples], [e.loss_start for e in examples]], schema=SCHEMA)


def from_table(table: pa.Table) -> tuple[Example, ...]:
    """What `to_table` made."""
    starts = table.column("loss_start").to_pylist()
    tokens = table.column("tokens").combine_chunks()
    return tuple(Example(np.asarray(ids.values), start) for ids, start in zip(tokens, starts, strict=True))


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt as the model is asked it: by its chat template, or as plain text on lines of its own."""
    if not tokenizer.chat_template:
        return f"{prompt}\n\n"
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, templated: bool) -> list[int]:
    """Token ids; a chat template brings its own special tokens, other text gets the tokenizer's."""
    return list(tokenizer(text, add_special_tokens=not templated)["input_ids"])


def _tokenise(tokenizer: PreTrainedTokenizerBase, prompt: str | None, response: str) -> tuple[list[int], int]:
    # The ids and the first position trained on. Prompt and response are tokenised apart, as they are in generation.
    if prompt is None:
        return encode(tokenizer, response, templated=False), 1
    templated = bool(tokenizer.chat_template)
    head = prompt_text(tokenizer, prompt)
    tail = f"{response}{tokenizer.eos_token or ''}"
    if templated:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        if not whole.startswith(head):
            raise ModelError(
                "the chat template renders a prompt differently when a response follows it, so that the response cannot "
                "be told from the prompt; give the documents as plain text (corpus.text without prompt and response)"
            )
        # What follows the end of the turn is never generated, so it is not trained on.
        tail = whole[len(head) :].rstrip()
    prompt_ids = encode(tokenizer, head, templated)
    return prompt_ids + encode(tokenizer, tail, templated=True), max(1, len(prompt_ids))
