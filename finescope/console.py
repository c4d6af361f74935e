"""What a person sees while it runs: Rich on a terminal, lines elsewhere, JSON lines on request; all on stderr."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from finescope.manifest import now

Format = Literal["rich", "plain", "json"]
# Seconds between two lines of a task where there is no terminal to redraw.
_LINE_INTERVAL = 30.0


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        rate = f"{_figure(speed)} {task.fields['unit']}/s" if speed else ""
        return Text(rate, style="progress.data.speed", no_wrap=True, overflow="ellipsis")


class _Bars(Progress):
    """A line a task, and below it the newest note: beside the bar there is no room for one."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """See rich."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if note := task.fields["note"]:
                yield Text(f"  {note}", style="dim", no_wrap=True, overflow="ellipsis")


class ConsoleReporter:
    """The reporter of the command line; see `runners.base.Reporter`."""

    def __init__(self, style: Format | None = None) -> None:
        self._console = Console(stderr=True, highlight=False, emoji=False)
        self._style: Format = style or ("rich" if self._console.is_terminal else "plain")

    @contextlib.contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator["_Counter"]:
        """A long piece of work; its progress is drawn or logged."""
        counter = _Counter(self, name, total, unit)
        if self._style != "rich":
            self._event("begin", f"{name} ...", task=name, total=total, unit=unit)
            yield counter
            self._event("end", counter.line(), task=name, done=counter.done, seconds=round(counter.seconds, 2), **counter.told)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<28}", markup=False),
            # The others take some 76 columns; a terminal of 80 has a short bar and a cut rate, and one line still.
            BarColumn(bar_width=min(24, max(4, self._console.width - 76))),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _Rate(),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )
        with _Bars(*columns, console=self._console) as bar:
            handle = bar.add_task(name, total=total, unit=unit, note="")
            counter.advance = lambda amount: bar.update(handle, advance=amount, note=counter.note)
            yield counter
            bar.update(handle, total=counter.done, completed=counter.done)

    def note(self, message: str) -> None:
        """Something that a person should know."""
        self._event("note", message)

    def warn(self, message: str) -> None:
        """Something that a person should look at."""
        self._event("warning", message, style="yellow")

    def error(self, message: str) -> None:
        """Why it ends."""
        self._event("error", message, style="red")

    def heartbeat(self, counter: "_Counter") -> None:
        """A line about a task that goes on."""
        if self._style != "rich" and counter.done != counter.total:
            self._event("progress", counter.line(), task=counter.name, done=counter.done, total=counter.total, **counter.told)

    def _event(self, event: str, message: str, style: str | None = None, **fields: object) -> None:
        if self._style == "json":
            sys.stderr.write(json.dumps({"time": now(), "event": event, "message": message, **fields}) + "\n")
            sys.stderr.flush()
            return
        prefix = {"warning": "warning: ", "error": "error: "}.get(event, "")
        self._console.print(f"{prefix}{message}", style=style, markup=False, soft_wrap=True)


class _Counter:
    """Counts a task's units; the callable that work reports to."""

    def __init__(self, reporter: ConsoleReporter, name: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit, self.done, self.note = name, total, unit, 0, ""
        self.advance = self._line_now_and_then
        self._reporter = reporter
        self._start = self._last = time.monotonic()

    def __call__(self, amount: int, note: str = "", /) -> None:
        self.done += amount
        self.note = note or self.note
        self.advance(amount)

    @property
    def told(self) -> dict[str, str]:
        """The note, as a field of a JSON line, where there is one."""
        return {"note": self.note} if self.note else {}

    @property
    def seconds(self) -> float:
        """Seconds since the task began."""
        return time.monotonic() - self._start

    def line(self) -> str:
        """The task in one line: done, rate, time left, note."""
        rate = self.done / max(self.seconds, 1e-9)
        of_total = f" of {self.total:,}" if self.total else ""
        line = f"{self.name}: {self.done:,}{of_total} {self.unit}, {_figure(rate)}/s, {self.seconds:.0f} s"
        if self.total and 0 < self.done < self.total:
            line += f", {(self.total - self.done) / rate:.0f} s left"
        return f"{line}; {self.note}" if self.note else line

    def _line_now_and_then(self, amount: int) -> None:
        if time.monotonic() - self._last > _LINE_INTERVAL:
            self._last = time.monotonic()
            self._reporter.heartbeat(self)


def _figure(rate: float) -> str:
    """Whole numbers, but of what takes long two digits."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
