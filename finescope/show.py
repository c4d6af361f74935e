"""What the commands that look at a run or a model print: tables for people, JSON for programs, both on stdout."""

import datetime
import json
import math
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finescope import storage
from finescope.analysis import origins, summaries
from finescope.analysis.digest import Summaries, digest
from finescope.analysis.frames import frames_of, manifests_of, tables_of
from finescope.analysis.table import closing_grid
from finescope.config import STEPS, ModelSection
from finescope.errors import ModelError, UserError
from finescope.manifest import Manifest, StepState, domains_of, label_of, of_domain, require_run, step_and_domain
from finescope.rounds import in_order

_HEAD_ROWS = 10
_CELL_CHARACTERS = 60
# Columns that are shares, beside those that are called so.
_SHARES = ("importance_removed", "differing")
# A pipe has no width: a column is as wide as its widest cell, and no line is folded.
_PIPE_WIDTH = 4000


def show_status(run: str, as_json: bool) -> None:
    """Print the steps of a run: state, path (relative to the run), rows, seconds.

    Raises:
        UserError: there is no run.
    """
    record, done = require_run(run), manifests_of(run)
    steps = {label: _status(record.steps.get(label), done.get(label)) for label in _labels(record.steps)}
    if as_json:
        _json({"run": run, "finescope": record.finescope, "steps": steps})
        return
    rows = [
        (name, row["state"], row["path"], row["rows"], row["rejects"], row["seconds"], row["error"] or row["where"])
        for name, row in steps.items()
    ]
    _table(run, ("step", "state", "path", "rows", "rejects", "seconds", ""), rows)


def show_tables(run: str, table: str | None, as_json: bool) -> None:
    """Print what a run's tables say, or one table: its columns, its first rows, its summaries.

    Raises:
        UserError: there is no run, or it has no such table.
    """
    manifests, tables = manifests_of(run), tables_of(run)
    if table is None:
        rows = [
            {"table": name, "step": step, "rows": manifests[step].tables[name].rows, "bytes": _bytes(manifests[step], name)}
            for name, steps in tables.items()
            for step in steps
        ]
        found = _digest(manifests)
        if as_json:
            _json({"run": run, "tables": rows, "summaries": _records(found)})
            return
        _frame("tables", pl.DataFrame(rows))
    else:
        if table not in tables:
            raise UserError(f"the run at '{run}' has no table '{table}'; its tables: {', '.join(tables) or 'none'}")
        frame, found = frames_of(manifests, table), _digest(manifests, table)
        head, rows_in_all = frame.head(_HEAD_ROWS).collect(), sum(manifests[step].tables[table].rows for step in tables[table])
        if as_json:
            columns = {name: str(kind) for name, kind in head.schema.items()}
            about = {"run": run, "table": table, "steps": tables[table], "rows": rows_in_all, "columns": columns}
            _json({**about, "head": head.to_dicts(), "summaries": _records(found)})
            return
        _frame(f"{table}: {rows_in_all:,} rows, by {', '.join(tables[table])}", head)
    for title, summary in found.items():
        _frame(title, summary)


def write_report(run: str) -> list[str]:
    """Write the report of each domain of a run again, with what is done by now; returns their paths.

    Raises:
        UserError: there is no run, or none of its steps is done.
    """
    from finescope.analysis import report

    output = storage.absolute(run)
    states, manifests = require_run(run).steps, manifests_of(run)
    if not manifests:
        raise UserError(f"the run at '{run}' has no step that is done, so that there is nothing to report")
    written = []
    for domain in domains_of(states) or [""]:
        label = label_of("report", domain)
        uri = storage.join(output, states[label].path if label in states else label, report.REPORT)
        report.write_report(output, of_domain(manifests, domain), uri)
        written.append(uri)
    return written


def show_model(model: str, as_json: bool) -> None:
    """Print what of a model's architecture is recognised and what can be pruned; reads no weights.

    Raises:
        ModelError: the model is not found, or a module of it is not recognised.
    """
    if not model.strip():
        raise ModelError("MODEL: expected a hub id, a directory, FILE.gguf or package:MODULE/FILE.gguf")
    from finescope.models.describe import describe

    found = describe(ModelSection.model_validate({"path": model}))
    if as_json:
        _json(found)
        return
    plain = {name: value for name, value in found.items() if not isinstance(value, Mapping | list)}
    _table(model, ("", ""), plain.items())
    columns = ("site", "module", "reads", "width", "layers")
    _table("sites (block N is layer N + 1)", columns, [[row[column] for column in columns] for row in found["sites"]])
    for name, column in (("prunable", "parameters"), ("not_prunable", "why"), ("modules", "parameters")):
        if found[name]:
            _table(name.replace("_", " "), ("part", column), found[name].items())


def closing_table(manifests: Mapping[str, Manifest]) -> None:
    """Print the end of a demo: the models beside each other, where the curated set is from, the time, the report's path."""
    grid = closing_grid(manifests)
    if grid.rows:
        rows = [(row.label, *(_with(*cell) for cell in zip(row.cells, row.relative, strict=True))) for row in grid.rows]
        _table("models (against base)", ("", *grid.columns), rows, right=range(1, len(grid.columns) + 1))
    if "curate" in manifests:
        by_source = origins.shares(manifests)
        if by_source.height:
            _frame("curated set by source", by_source)
    times = summaries.wall_time(manifests)
    total = pl.DataFrame({"step": ["in all"], "seconds": [times["seconds"].sum()], "share": [1.0]})
    _frame("wall time", pl.concat([times.select("step", "seconds", "share"), total]))
    if "report" in manifests:
        from finescope.analysis.report import REPORT

        sys.stdout.write(f"report: {storage.join(manifests['report'].uri, REPORT)}\n")


def _labels(begun: Mapping[str, StepState]) -> list[str]:
    """All steps of a run: those that are shared, and the others for each domain of which one was begun."""
    domains = domains_of(begun)
    steps = in_order({*STEPS, *(step for step, _ in map(step_and_domain, begun))})
    own = {step for step, domain in map(step_and_domain, begun) if domain}
    first = min((steps.index(step) for step in own), default=len(steps))
    shared = steps[:first] + [step for step in steps[first:] if step in begun]
    return shared + [label_of(step, domain) for step in steps[first:] for domain in domains]


def _digest(manifests: Mapping[str, Manifest], table: str | None = None) -> Summaries:
    """The summaries of a run; in a run of several domains those of each one's own tables, with its name in the title."""
    domains = domains_of(manifests)
    if not domains:
        return digest(manifests, table)
    found = digest(of_domain(manifests, ""), table)
    for domain in domains:
        own = {name for label in manifests if step_and_domain(label)[1] == domain for name in manifests[label].tables}
        for name in sorted(own if table is None else own & {table}):
            of_table = digest(of_domain(manifests, domain), name)
            found |= {f"{title} ({domain})": frame for title, frame in of_table.items()}
    return found


def _status(state: StepState | None, manifest: Manifest | None) -> dict[str, Any]:
    """A step as `status` tells of it. A driver on another machine cannot be looked for, so it is believed."""
    row: dict[str, Any] = {"state": "not begun", "path": None, "identity": None, "rows": None, "rejects": None, "seconds": None}
    row |= {"started": None, "finished": None, "error": None, "where": None}
    if state is None:
        return row
    row |= {name: getattr(state, name) for name in ("state", "path", "identity", "started", "finished", "error")}
    if manifest is not None and manifest.identity == state.identity:
        counts = {"rows": manifest.rows_out, "rejects": manifest.rejects, "seconds": manifest.seconds}
        return row | counts | {"state": "done", "finished": manifest.finished, "error": None}
    if state.state == "done":
        return row | {"state": "missing", "error": "run.json says done, and its manifest is gone"}
    if state.state == "running":
        return row | _running(state)
    return row


def _running(state: StepState) -> dict[str, Any]:
    if not state.alive and state.host == socket.gethostname():
        return {"state": "interrupted", "error": "the same command goes on where it stopped"}
    began = datetime.datetime.fromisoformat(state.started)
    seconds = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
    return {"seconds": round(seconds, 1), "where": f"process {state.pid} on {state.host}"}


def _bytes(manifest: Manifest, table: str) -> int:
    return sum(file.bytes for file in manifest.tables[table].files)


def _records(found: Mapping[str, pl.DataFrame]) -> dict[str, list[dict[str, Any]]]:
    return {title: frame.to_dicts() for title, frame in found.items()}


def _with(cell: str, relative: str) -> str:
    return f"{cell} ({relative})" if relative else cell


def _frame(title: str, frame: pl.DataFrame) -> None:
    right = [at for at, kind in enumerate(frame.dtypes) if kind.is_numeric()]
    shares = [at for at, name in enumerate(frame.columns) if name.endswith("share") or name in _SHARES]
    rows = [[_percent(cell) if at in shares else cell for at, cell in enumerate(row)] for row in frame.iter_rows()]
    _table(title, frame.columns, rows, right)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[int] = ()) -> None:
    """Rich on a terminal; aligned plain columns elsewhere."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    style = box.SIMPLE_HEAD
    if not console.is_terminal:
        console, style = Console(file=sys.stdout, highlight=False, markup=False, width=_PIPE_WIDTH), None
    drawn = Table(title=Text(title), title_justify="left", box=style, pad_edge=False, header_style="bold")
    for at, column in enumerate(columns):
        drawn.add_column(column, justify="right" if at in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(_cell(value)) for value in row))
    console.print(drawn)
    console.print()


def _cell(value: Any) -> str:
    """A value in a cell. What does not print is dropped: text of a corpus must not steer the terminal."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    printable = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return printable if len(printable) <= _CELL_CHARACTERS else printable[: _CELL_CHARACTERS - 3] + "..."


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _json(value: Any) -> None:
    sys.stdout.write(json.dumps(_strict(value), ensure_ascii=False, indent=2) + "\n")


def _strict(value: Any) -> Any:
    """JSON has no infinity, no time and no bytes; a source row may have all of them."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
