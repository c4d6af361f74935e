"""`index` on its own: tasks of many small files, ranges of a large one, and ids that stand twice."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import SilentReporter
from corpus_files import jsonl, section

from finescope import schemas
from finescope.errors import CorpusError
from finescope.runners.base import Context, Resources
from finescope.runners.local import LocalRunner
from finescope.stages import index as index_
from finescope.stages.repeated_ids import repeated_ids
from finescope.steps import Outcome, StepInput


class CountingRunner(LocalRunner):
    """Keeps what it was given; does the last unit first."""

    def map(self, worker: Any, arguments: tuple[Any, ...], units: pa.Table, resources: Resources) -> Any:
        """See `Runner.map`."""
        self.arguments, self.units = arguments, units
        return super().map(worker, arguments, units.take(list(reversed(range(units.num_rows)))), resources)


def indexed(path: Path, output: Path, **settings: Any) -> tuple[Outcome, list[dict[str, Any]], CountingRunner]:
    runner = CountingRunner()
    outcome = index_.index(Context(runner, SilentReporter()), section(path, **settings), StepInput(str(output), "i", {}))
    (file,) = outcome.tables["documents"]
    table = pq.read_table(output / file.path)
    assert table.schema.equals(schemas.DOCUMENTS)
    assert {name.name for name in output.iterdir()} == {"documents", "rejects"}
    return outcome, table.to_pylist(), runner


def test_small_files_share_tasks_and_all_are_listed_in_order(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for number in range(150):
        jsonl(tmp_path / "c" / f"{number:03d}.jsonl", *({"id": f"{number}-{at}", "text": "x"} for at in range(number % 3 + 1)))
    (tmp_path / "c" / "070.jsonl").unlink()
    (tmp_path / "c" / "070.jsonl.gz").write_bytes(b"damaged")
    outcome, units, runner = indexed(tmp_path / "c", tmp_path / "out", id="id")
    assert (outcome.rows_in, outcome.rows_out, outcome.rejects) == (150, 149, 1)
    names = [Path(unit["file"]).name for unit in units]
    assert names == [f"{number:03d}.jsonl" for number in range(150) if number != 70]
    assert [unit["num_rows"] for unit in units] == [number % 3 + 1 for number in range(150) if number != 70]
    assert runner.units.num_rows == 3, "of about 64 files each"
    assert len(runner.arguments) == 2, "the list of files does not go to every actor"
    facts = {"files": 150, "directory": f"{tmp_path}/c/", "commits": [], "documents": 300 - 2, "shape": None}
    assert outcome.facts == facts
    assert runner.units.column("task").to_pylist() == [0, 1, 2]


def test_tasks_are_packed_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_, "_OPENING_BYTES", 0)
    monkeypatch.setattr(index_, "_TASK_BYTES", 20_000)
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"{at:087d}"} for at in range(1000)))
    tables = []
    for packed in (1, 4, 6, 4096):
        monkeypatch.setattr(index_, "_PACKED_RANGES", packed)
        tables.append(indexed(path, tmp_path / f"out-{packed}", range_mib=10_000 / 2**20)[2].units)
    assert all(table.equals(tables[0]) for table in tables)
    assert tables[0].column("task").to_pylist() == [0, 1, 2, 3, 4]
    assert [entry["range"] for task in tables[0].to_pylist() for entry in task["ranges"]] == list(range(10))


def test_ranges_of_a_large_file_are_tasks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_, "_OPENING_BYTES", 0)
    monkeypatch.setattr(index_, "_TASK_BYTES", 20_000)
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"{at:087d}"} for at in range(1000)))
    outcome, units, runner = indexed(path, tmp_path / "out", range_mib=10_000 / 2**20)
    assert runner.units.num_rows == 5
    assert [(unit["row_group"], unit["start"], unit["num_rows"], unit["bytes"]) for unit in units] == [
        (number, 10_000 * number, 100, 10_000) for number in range(10)
    ]
    assert outcome.facts["documents"] == 1000


@pytest.mark.parametrize("at_once", [1000, 7])
def test_repeated_ids_are_found_in_memory_or_out_of_core(tmp_path: Path, at_once: int) -> None:
    names = [f"id-{at}" for at in range(100)]
    for number, ids in enumerate((names, [*names[5:9], "new"], ["other", "id-7", "new"])):
        (tmp_path / "ids").mkdir(exist_ok=True)
        pl.DataFrame({"id": ids}).write_parquet(tmp_path / "ids" / f"part-{number}.parquet")
    assert repeated_ids(str(tmp_path / "ids"), at_once) == (5, [("id-5", 2), ("id-6", 2), ("id-7", 3)])
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]
    assert repeated_ids(str(tmp_path / "none"), at_once) == (0, [])


def test_repeated_ids_are_found_whatever_the_directory_is_called(tmp_path: Path) -> None:
    ids = tmp_path / "out[1]*" / "ids"
    ids.mkdir(parents=True)
    pl.DataFrame({"id": [f"id-{at % 20}" for at in range(21)]}).write_parquet(ids / "part-0.parquet")
    assert repeated_ids(str(ids), 100) == repeated_ids(str(ids), 5) == (1, [("id-0", 2)])


def test_an_id_in_two_ranges_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"id": at % 99, "text": json.dumps(at)} for at in range(100)))
    with pytest.raises(CorpusError, match=r"column 'id' is not unique: 1 ids stand more than once, such as '0' \(2 times\)"):
        indexed(path, tmp_path / "out", id="id", range_mib=500 / 2**20)
