"""Rewriting of responses by the unpruned model: self-data distillation (METHOD.md, section 5).

The paper's teacher-guided distillation and arXiv 2402.13669: y' ~ M(. | instruction c, reference y), y' in the model's
own words, so that the student is trained on text that the model would have written itself.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from finescope import schemas
from finescope.distillation.checks import rejection
from finescope.distillation.examples import encode
from finescope.distillation.writer import Task, Writer

NOT_SELECTED = "not selected"
REFERENCE_TOO_LONG = "the original is longer than rewrite_tokens"
PROMPT_TOO_LONG = "does not fit the teacher's context"

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


class Rewriter:
    """Maps documents to rewrites: what is asked of the teacher, and whether its answer may be used."""

    def __init__(self, writer: Callable[[], Writer], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        """`writer`: made when the first document needs it. `tokenizer`: what lengths are counted with."""
        self._writer = functools.cache(writer)
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens

    def __call__(self, documents: pa.Table, progress: Callable[[int], Any]) -> pa.Table:
        """Rewrite the responses that are selected and check them. `progress` is told of documents.

        documents: doc_id, prompt (null for plain text), response, selected (bool). Returns `schemas.REWRITES`, a row a
        document in the same order: `used` is "rewrite" with an empty `reason`, or "original" and why.
        """
        rows = documents.select(["doc_id", "prompt", "response", "selected"]).to_pylist()
        outcome: list[tuple[str | None, str]] = [(None, NOT_SELECTED)] * len(rows)  # rewrite, reason
        tasks: dict[int, Task] = {}
        for index, row in enumerate(rows):
            if row["selected"]:
                budget = self._budget(row["response"])
                if budget is None:
                    outcome[index] = (None, REFERENCE_TOO_LONG)
                else:
                    tasks[index] = Task(row["doc_id"], _message(row["prompt"], row["response"]), budget)
        progress(len(rows) - len(tasks))
        answers = self._writer()(list(tasks.values()), progress) if tasks else []
        for index, written in zip(tasks, answers, strict=True):
            if written is None:
                outcome[index] = (None, PROMPT_TOO_LONG)
            else:
                text = _PREAMBLE.sub("", written.text).strip()
                outcome[index] = (text, rejection(rows[index]["response"], text, written.finished))
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

    def _budget(self, response: str) -> int | None:
        """Tokens that a rewrite may take; None where the original has too many for it to be rewritten."""
        reference = len(encode(self._tokenizer, response, templated=True))
        if reference > self._max_new_tokens:
            return None
        return min(self._max_new_tokens, int(_BUDGET_SHARE * reference) + _BUDGET_SPARE)


def select_first(documents: pa.Table, share: float) -> pa.Table:
    """`documents`, best first, with the column `selected`: true for the first `share` of them."""
    count = round(share * documents.num_rows)
    selected = pa.array([index < count for index in range(documents.num_rows)], pa.bool_())
    return documents.append_column("selected", selected)


def _message(prompt: str | None, response: str) -> str:
    return _PLAIN_TEXT.format(response=response) if prompt is None else _WITH_PROMPT.format(prompt=prompt, response=response)
