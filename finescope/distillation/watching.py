"""What rank 0 tells of a training while it goes on: trackers, a file of JSON lines, the live line."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finescope import directories, storage
from finescope.distillation.checkpoint import Cursor
from finescope.distillation.job import TrainJob
from finescope.distillation.trackers import TrackedRun
from finescope.distillation.tracking import Trackers, live_note, open_trackers

_PROJECT = "finescope"


class Watch:
    """Tells of each step once; on other ranks than 0 of nothing."""

    def __init__(self, progress: Callable[[int, str], Any] | None, trackers: Trackers, history: str) -> None:
        self._progress, self._trackers, self._history = progress, trackers, history
        self._told = 0

    def steps(self, cursor: Cursor) -> None:
        """Of all steps up to `cursor` that were not told of: those of an earlier attempt too."""
        if self._progress is None or cursor.step == self._told:
            return
        for step, row in enumerate(cursor.metrics[self._told :], start=self._told + 1):
            self._trackers.log(step, row)
        self._progress(cursor.step - self._told, live_note(cursor.metrics[-1], self._trackers.lost))
        self._told = cursor.step

    def checkpoint(self, cursor: Cursor) -> None:
        """The history as it stands, as JSON lines: object stores cannot append."""
        if self._progress is not None:
            storage.put_jsonl(self._history, [{"step": step, **row} for step, row in enumerate(cursor.metrics, start=1)])

    def ended(self, steps: int) -> None:
        """The training ended, perhaps before all of its `steps`."""
        if self._progress is not None and steps > self._told:
            self._progress(steps - self._told, "")


@contextlib.contextmanager
def watched(job: TrainJob, identity: str, progress: Callable[[int, str], Any] | None) -> Iterator[Watch]:
    """A watch over a training of that `identity`; `progress` is None on other ranks than 0.

    Raises:
        ResourceError: a tracker of `job.track` is not installed or refuses.
    """
    history = storage.join(job.output, "metrics.jsonl")
    if progress is None or not job.track:
        yield Watch(progress, Trackers(), history)
        return
    with _directory(storage.join(job.output, "tracked")) as directory:
        settings = {"student": job.student, **job.section.model_dump(mode="json")}
        run = TrackedRun(_PROJECT, job.output, identity[:16], settings, directory)
        with open_trackers(job.track, run) as trackers:
            yield Watch(progress, trackers, history)


@contextlib.contextmanager
def _directory(uri: str) -> Iterator[Path]:
    """Where trackers that keep files write them: at `uri`, or on this machine until the training ends."""
    if storage.is_local(uri):
        yield Path(storage.filesystem(uri)[1])
        return
    with directories.temporary_directory(uri) as root:
        yield root / "tracked"
        if (root / "tracked").is_dir():
            directories.put_tree(root / "tracked", uri)
