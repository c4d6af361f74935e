import json
import re
from typing import Any

import pytest
from rich.console import Console

from finescope import console
from finescope.console import ConsoleReporter


class Clock:
    """Stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock.monotonic)
    return clock


def work(reporter: ConsoleReporter, clock: Clock, total: int | None = 1000) -> None:
    """1,000 units in 80 seconds, 250 every twenty."""
    with reporter.task("embed: encoding", total, "documents") as progress:
        for _ in range(4):
            clock.now += 20
            progress(250)


def test_plain_lines_tell_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]):
    reporter = ConsoleReporter("plain")
    work(reporter, clock)
    captured = capsys.readouterr()
    assert captured.out == "", "stdout is for results"
    assert captured.err.splitlines() == [
        "embed: encoding ...",
        "embed: encoding: 500 of 1,000 documents, 12/s, 40 s, 40 s left",
        "embed: encoding: 1,000 of 1,000 documents, 12/s, 80 s",
    ]


def test_without_a_total_there_is_no_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]):
    work(ConsoleReporter("plain"), clock, total=None)
    lines = capsys.readouterr().err.splitlines()
    last = "embed: encoding: 1,000 documents, 12/s, 80 s"
    assert lines == ["embed: encoding ...", "embed: encoding: 500 documents, 12/s, 40 s", last, last]


def test_quick_tasks_are_two_lines(clock: Clock, capsys: pytest.CaptureFixture[str]):
    reporter = ConsoleReporter("plain")
    with reporter.task("index", 3, "files") as progress:
        for _ in range(3):
            progress(1)
    with reporter.task("nothing", 0, "files"):
        pass
    assert len(capsys.readouterr().err.splitlines()) == 4


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines(clock: Clock, capsys: pytest.CaptureFixture[str]):
    reporter = ConsoleReporter("json")
    reporter.note('two\nlines, "quoted", é [bold]')
    work(reporter, clock)
    reporter.warn("look")
    reporter.error("end")
    captured = capsys.readouterr()
    assert captured.out == ""
    found = events(captured.err)
    assert [event["event"] for event in found] == ["note", "begin", "progress", "end", "warning", "error"]
    assert found[0]["message"] == 'two\nlines, "quoted", é [bold]'
    assert found[1] | {"task": "embed: encoding", "total": 1000, "unit": "documents"} == found[1]
    assert found[2] | {"task": "embed: encoding", "done": 500, "total": 1000} == found[2]
    assert found[3] | {"task": "embed: encoding", "done": 1000, "seconds": 80.0} == found[3]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", event["time"]) for event in found)


NOTE = "loss 2.31, held-out 2.40, lr 4.1e-05, 1,250 tokens/s, 3.1 GB"


@pytest.mark.parametrize("style", ["plain", "json"])
def test_the_newest_note_is_in_the_lines_and_in_no_more_of_them(style: Any, clock: Clock, capsys: pytest.CaptureFixture[str]):
    """100 steps, a note each, the last told without one: lines after 31 s, 62 s and 93 s, and the last."""
    with ConsoleReporter(style).task("distill: training", 100, "steps") as progress:
        for step in range(1, 101):
            clock.now += 1
            progress(1, f"loss {step}" if step < 100 else "")
    lines = capsys.readouterr().err.splitlines()
    if style == "json":
        found = events("\n".join(lines))
        assert [event.get("note") for event in found] == [None, "loss 31", "loss 62", "loss 93", "loss 99"]
        lines = [event["message"] for event in found]
    assert lines == [
        "distill: training ...",
        "distill: training: 31 of 100 steps, 1/s, 31 s, 69 s left; loss 31",
        "distill: training: 62 of 100 steps, 1/s, 62 s, 38 s left; loss 62",
        "distill: training: 93 of 100 steps, 1/s, 93 s, 7 s left; loss 93",
        "distill: training: 100 of 100 steps, 1/s, 100 s; loss 99",
    ]


def test_slow_work_has_a_rate(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with ConsoleReporter("plain").task("distill: training", 3, "steps") as progress:
        for _ in range(3):
            clock.now += 40
            progress(1)
    assert capsys.readouterr().err.splitlines()[1:3] == [
        "distill: training: 1 of 3 steps, 0.025/s, 40 s, 80 s left",
        "distill: training: 2 of 3 steps, 0.025/s, 80 s, 40 s left",
    ]


def test_messages_are_not_markup(capsys: pytest.CaptureFixture[str]):
    reporter = ConsoleReporter("plain")
    reporter.note("[red]a[/red] [/nothing] :smile: " + "x" * 200)
    reporter.warn("w")
    reporter.error("e")
    assert capsys.readouterr().err.splitlines() == ["[red]a[/red] [/nothing] :smile: " + "x" * 200, "warning: w", "error: e"]


def test_where_there_is_no_terminal_it_is_plain(capsys: pytest.CaptureFixture[str], clock: Clock):
    work(ConsoleReporter(), clock)
    assert capsys.readouterr().err.startswith("embed: encoding ...\n")


def _rich(terminal: bool, monkeypatch: pytest.MonkeyPatch, width: int = 120) -> ConsoleReporter:
    monkeypatch.setenv("TERM", "xterm")
    made = Console
    monkeypatch.setattr(console, "Console", lambda **settings: made(**settings, force_terminal=terminal, width=width))
    return ConsoleReporter("rich")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("total", [None, 0, 3])
def test_rich_draws_a_bar_anywhere(
    terminal: bool, total: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    reporter = _rich(terminal, monkeypatch)
    with reporter.task("model: a[v1][/b].gguf", total, "documents") as progress:
        for _ in range(3):
            progress(1)
        reporter.note("meanwhile")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "meanwhile" in captured.err
    assert "3/3" in captured.err
    assert "model: a[v1][/b].gguf" in captured.err


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_note_is_a_line_of_its_own_below_the_bar(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with _rich(False, monkeypatch, width).task("distill: [training]", 2, "steps") as progress:
        progress(1, "an older one")
        progress(1, NOTE)
    bar, note = capsys.readouterr().err.splitlines()
    assert "2/2" in bar
    assert len(bar) <= width
    assert note.rstrip() == f"  {NOTE}" if width > len(NOTE) + 2 else f"  {NOTE}"[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


@pytest.mark.parametrize("style", ["plain", "json", "rich"])
def test_a_task_in_a_task(style: Any, capsys: pytest.CaptureFixture[str]):
    reporter = ConsoleReporter(style)
    with reporter.task("outer", 2, "steps") as outer:
        with reporter.task("inner", 1, "files") as inner:
            inner(1)
        outer(2)
    assert "outer" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["plain", "json", "rich"])
def test_an_error_in_a_task_comes_out(style: Any, capsys: pytest.CaptureFixture[str]):
    reporter = ConsoleReporter(style)
    with pytest.raises(ValueError, match="boom"), reporter.task("t", 2, "files"):
        raise ValueError("boom")
    reporter.error("boom")
    assert "boom" in capsys.readouterr().err
