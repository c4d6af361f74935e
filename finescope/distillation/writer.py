"""Who writes: what a teacher is asked and what it answers, whatever it runs on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Task:
    """One user's message, and how much may be answered to it."""

    doc_id: str
    message: str
    budget: int  # tokens


@dataclass(frozen=True)
class Written:
    """The answer to a task."""

    text: str
    finished: bool  # the teacher ended it by itself; else its budget ran out


class Writer(Protocol):
    """A teacher that answers tasks."""

    def __call__(self, tasks: Sequence[Task], progress: Callable[[int], Any]) -> list[Written | None]:
        """The answers, in the order of `tasks`; None where message and answer do not fit the teacher's context.

        An answer does not depend on the other tasks. `progress` is told of tasks that are done.
        """
        ...


def document_seed(seed: int, doc_id: str) -> int:
    """What a document's answer is sampled with, in the 31 bits that every engine takes."""
    digest = hashlib.blake2b(f"{seed}\n{doc_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
