"""Documents by locator: which units are read, in which order."""

from pathlib import Path
from typing import Any, cast

import polars as pl
from cli_runs import SilentReporter
from corpus_files import jsonl, section
from test_stages_index import CountingRunner

from finescope.models.load import ModelReference
from finescope.runners.base import Context
from finescope.runners.local import LocalRunner
from finescope.stages.index import index
from finescope.stages.references import corpus_of, read_located
from finescope.steps import Step, run


def test_units_are_read_in_order_and_rows_come_as_they_are_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl.gz", *({"text": f"{at:087d}"} for at in range(1000)))
    corpus, local = section(path, range_mib=10_000 / 2**20), Context(LocalRunner(), SilentReporter())
    manifest = run(Step("index", {}), str(tmp_path / "out"), lambda step: index(local, corpus, step))
    wanted = [(7, 3), (2, 0), (9, 99), (2, 5), (0, 1)]
    located = pl.DataFrame({"file": 0, "row_group": [unit for unit, _ in wanted], "row": [row for _, row in wanted]})
    runner = CountingRunner()
    model = cast(ModelReference, None)  # only messages need it
    read = read_located(Context(runner, SilentReporter()), manifest, model, corpus_of(corpus, manifest), located, "x")
    assert read.column("text").to_pylist() == [f"{100 * unit + row:087d}" for unit, row in wanted]
    units: list[dict[str, Any]] = runner.units.to_pylist()
    assert [(unit["unit"], unit["rows"]) for unit in units] == [(0, [1]), (2, [0, 5]), (7, [3]), (9, [99])]
