"""Checkpoints on storage: complete ones only, the newest first, the last two kept and one more that is named."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finescope import directories, storage

DONE = "done.json"
KEPT = 2
_NAME = re.compile(r"step-(\d{8})/" + re.escape(DONE) + "$")


def save(
    uri: str, step: int, record: Mapping[str, Any], write: Callable[[Path], None], *, first: bool, keep: int | None = None
) -> None:
    """Write the checkpoint of `step` below `uri`: its files first, the record that makes it count last. That of `keep` stays.

    All processes of a group call it, as `write` (which is given a local directory) may gather what is spread over them;
    only the `first` of them puts files.
    """
    target = _place(uri, step)
    with directories.scratch_directory(target) as directory:
        directory.mkdir(parents=True)
        write(directory)
        if first:
            directories.put_tree(directory, target)
            storage.put_json(storage.join(target, DONE), dict(record))
            for old in filter(lambda step: step != keep, complete_steps(uri)[KEPT:]):
                # The record first: a checkpoint that is half gone must not count.
                storage.delete(storage.join(_place(uri, old), DONE))
                storage.delete(_place(uri, old))


def read_record(uri: str, step: int) -> dict[str, Any]:
    """What was saved beside the files of a complete checkpoint."""
    return storage.read_json(storage.join(_place(uri, step), DONE))


@contextlib.contextmanager
def files_of(uri: str, step: int) -> Iterator[Path]:
    """The files of a complete checkpoint, in a local directory for as long as the context lasts."""
    with directories.local_directory(_place(uri, step)) as directory:
        yield directory


def complete_steps(uri: str) -> list[int]:
    """The steps of the complete checkpoints below `uri`, newest first."""
    found = (_NAME.search(file.path) for file in storage.glob(uri))
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def _place(uri: str, step: int) -> str:
    return storage.join(uri, f"step-{step:08d}")
