"""Training examples, and in which order and on which process each is trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from finescope.errors import ModelError

SCHEMA = pa.schema([("tokens", pa.list_(pa.int32())), ("loss_start", pa.int32())])
IGNORED = -100  # the target of a position that is not trained on


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


@dataclass(frozen=True, eq=False)
class Step:
    """What one optimiser step trains on: examples by index, each cut to a length."""

    indices: np.ndarray  # [documents] int64
    lengths: np.ndarray  # [documents] int64, tokens

    @property
    def tokens(self) -> int:
        """Tokens that are read, padding not counted."""
        return int(self.lengths.sum())


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


def plan_steps(examples: Sequence[Example], batch_size: int, epochs: int, seed: int, cap_tokens: int | None) -> list[Step]:
    """All optimiser steps of a training, in order: a permutation an epoch, from (seed, epoch), cut into batches.

    With `cap_tokens` it ends after exactly so many tokens, in as many epochs as that takes, the last example cut short;
    it may end up to one prompt earlier, as an example cut before its response has nothing to train on.
    """
    lengths = np.array([len(e.tokens) for e in examples], dtype=np.int64)
    starts = np.array([e.loss_start for e in examples], dtype=np.int64)
    steps: list[Step] = []
    left, epoch = cap_tokens, 0
    while len(examples) and (epoch < epochs if left is None else left > 0):
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            kept = lengths[indices]
            if left is not None:
                kept = np.clip(left - (np.cumsum(kept) - kept), 0, kept)
                left -= int(kept.sum())
                indices, kept = indices[kept > starts[indices]], kept[kept > starts[indices]]
            if len(indices):
                steps.append(Step(indices, kept))
        epoch += 1
    return steps


def micro_batches(step: Step, rank: int, world_size: int, budget: int) -> list[np.ndarray]:
    """This process's share of a step as positions into `step.indices`, in forward passes of at most `budget` tokens.

    Documents are sorted by length and dealt out in turn, so that shares are alike. Every process gets the same number
    of passes, some perhaps empty: sharded engines talk to each other in each. A longer document has a pass of its own.
    """
    order = np.lexsort((step.indices, -step.lengths))
    shares = [_within_budget(order[other::world_size], step.lengths, budget) for other in range(world_size)]
    passes = max(len(share) for share in shares)
    return shares[rank] + [np.empty(0, dtype=np.int64)] * (passes - len(shares[rank]))


def collate(examples: Sequence[Example], step: Step, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, both [documents, longest] int64, padded on the right with 0 and `IGNORED`.

    targets[d, t] is the token after position t where it is trained on. A causal model needs no attention mask here:
    nothing looks to the right. An empty micro-batch is one token without a target.
    """
    longest = int(step.lengths[positions].max(initial=1))
    tokens = np.zeros((max(1, len(positions)), longest), dtype=np.int64)
    targets = np.full_like(tokens, IGNORED)
    for row, position in enumerate(positions):
        example, length = examples[int(step.indices[position])], int(step.lengths[position])
        tokens[row, :length] = example.tokens[:length]
        targets[row, example.loss_start - 1 : length - 1] = example.tokens[example.loss_start : length]
    return tokens, targets


def loss_tokens(examples: Sequence[Example], step: Step) -> int:
    """The targets of a whole step, over all processes: what its loss is normalised by."""
    return int(step.lengths.sum()) - sum(examples[int(index)].loss_start for index in step.indices)


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


def _within_budget(order: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    batches: list[np.ndarray] = []
    begin = 0
    for end in range(1, len(order) + 1):
        # Longest first: the first document of a pass sets the length that the others are padded to.
        if end == len(order) or lengths[order[begin]] * (end + 1 - begin) > budget:
            batches.append(order[begin:end])
            begin = end
    return batches
