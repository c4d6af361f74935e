"""Rewriting of responses by the unpruned model: self-data distillation (METHOD.md, section 5).

The paper's teacher-guided distillation and arXiv 2402.13669: y' ~ M(. | instruction c, reference y), y' in the model's
own words, so that the student is trained on text that the model would have written itself.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finescope import schemas
from finescope.distillation.checks import rejection
from finescope.distillation.examples import encode, prompt_text
from finescope.distillation.generate import generate

NOT_SELECTED = "not selected"
REFERENCE_TOO_LONG = "the original is longer than rewrite_tokens"
PROMPT_TOO_LONG = "does not fit the model's context"

# What differs from row to row stands last: the tokens before it are read once for all rows.
_WITH_PROMPT = (
    "Below are an instruction and a reference response. Write the response again in your own words. Keep its meaning, "
    "every step, every number and the final answer. Write the response only.\n\n"
    "### Instruction:\n{prompt}\n\n### Reference response:\n{response}"
)
_PLAIN_TEXT = (
    "Write the text below again in your own words. Keep every fact, name, number and formula. Write the text only."
    "\n\n### Text:\n{response}"
)
# A chat model's announcement of what it was asked for is no part of the response.
_PREAMBLE = re.compile(r"^\s*(?:sure|certainly|of course|here(?:['\u2019]s| is| are))\b[^\n]{0,120}:\s*\n+", re.IGNORECASE)
# A rewrite may take so many tokens: a row that wanders is stopped early and the original kept.
_BUDGET_SHARE, _BUDGET_SPARE = 1.5, 16


@dataclass(frozen=True)
class _Task:
    row: int
    prompt: list[int]
    budget: int  # tokens


class Rewriter:
    """Maps documents to rewrites, greedily and so without a seed."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, batch_tokens: int
    ) -> None:
        """`batch_tokens`: cached positions (prompt and rewrite, padding counted) of the rows that are written together."""
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._batch_tokens = batch_tokens
        self._context = int(getattr(model.config, "max_position_embeddings", 0)) or 2**31
        self._ends = _end_tokens(model, tokenizer)

    def __call__(self, documents: pa.Table, progress: Callable[[int], Any]) -> pa.Table:
        """Rewrite the responses that are selected and check them. `progress` is told of documents.

        documents: doc_id, prompt (null for plain text), response, selected (bool). Returns `schemas.REWRITES`, a row a
        document in the same order: `used` is "rewrite" with an empty `reason`, or "original" and why.
        """
        rows = documents.select(["doc_id", "prompt", "response", "selected"]).to_pylist()
        outcome: list[tuple[str | None, str]] = [(None, NOT_SELECTED)] * len(rows)  # rewrite, reason
        tasks: list[_Task] = []
        for index, row in enumerate(rows):
            if row["selected"]:
                task = self._task(index, row["prompt"], row["response"])
                if isinstance(task, str):
                    outcome[index] = (None, task)
                else:
                    tasks.append(task)
        progress(len(rows) - len(tasks))
        for task, text, finished in self._write(tasks, progress):
            original = rows[task.row]["response"]
            outcome[task.row] = (text, rejection(original, text, finished))
        kept = [text if text is not None and not reason else None for text, reason in outcome]
        table = pa.table(
            {
                "doc_id": [row["doc_id"] for row in rows],
                "prompt": pa.array([row["prompt"] for row in rows], pa.string()),
                "response_original": [row["response"] for row in rows],
                "response": [row["response"] if text is None else text for row, text in zip(rows, kept, strict=True)],
                "used": ["original" if text is None else "rewrite" for text in kept],
                "reason": [reason for _, reason in outcome],
            }
        )
        return schemas.conform(table, schemas.REWRITES)

    def _task(self, row: int, prompt: str | None, response: str) -> _Task | str:
        """What is to be generated, or why nothing is."""
        reference = len(encode(self._tokenizer, response, templated=True))
        if reference > self._max_new_tokens:
            return REFERENCE_TOO_LONG
        text = _PLAIN_TEXT.format(response=response) if prompt is None else _WITH_PROMPT.format(prompt=prompt, response=response)
        tokens = encode(self._tokenizer, prompt_text(self._tokenizer, text), bool(self._tokenizer.chat_template))
        budget = min(self._max_new_tokens, int(_BUDGET_SHARE * reference) + _BUDGET_SPARE)
        return PROMPT_TOO_LONG if len(tokens) + budget > self._context else _Task(row, tokens, budget)

    def _write(self, tasks: list[_Task], progress: Callable[[int], Any]) -> list[tuple[_Task, str, bool]]:
        if not tasks:
            return []
        prompts, budgets = [task.prompt for task in tasks], [task.budget for task in tasks]
        written = generate(self._model, prompts, budgets, self._ends, self._batch_tokens, progress)
        texts = [str(self._tokenizer.decode(one.tokens, skip_special_tokens=True)) for one in written]
        return [
            (task, _PREAMBLE.sub("", text).strip(), one.finished) for task, text, one in zip(tasks, texts, written, strict=True)
        ]


def select_first(documents: pa.Table, share: float) -> pa.Table:
    """`documents`, best first, with the column `selected`: true for the first `share` of them."""
    count = round(share * documents.num_rows)
    selected = pa.array([index < count for index in range(documents.num_rows)], pa.bool_())
    return documents.append_column("selected", selected)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)
