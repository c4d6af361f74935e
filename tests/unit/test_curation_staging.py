from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from finescope.curation import staging
from finescope.curation.staging import POSITION, UNIT, Staging


def rows(unit: int, positions: list[int], **more: list[object]) -> pa.Table:
    values = [f"text {position}" for position in positions]
    return pa.table({"text": values, **more, POSITION: positions, UNIT: [unit] * len(positions)})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PART_ROWS", 10)


@pytest.mark.parametrize("buffer", [1, 600, 10**9])
@pytest.mark.usefixtures("small")
def test_rows_come_out_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int) -> None:
    monkeypatch.setattr(staging, "_BUFFER_BYTES", buffer)
    random, found = np.random.default_rng(0), Staging(tmp_path / "staging")
    for start, end in ((0, 37), (37, 64)):
        positions = random.permutation(np.arange(start, end))
        for unit, part in enumerate(np.array_split(positions, 7)):
            found.add(rows(unit, part.tolist()))
        found.seal()
        read = [p for table in found.from_position(start, [POSITION]) for p in table.column(POSITION).to_pylist()]
        assert read == list(range(start, end))
    order = random.permutation(64)[:50].tolist()
    taken = found.take(order)
    assert taken.column(POSITION).to_pylist() == order
    assert taken.column("text").to_pylist() == [f"text {position}" for position in order]
    assert found.value(63, "text") == "text 63"
    assert len(list((tmp_path / "staging").iterdir())) == 8, "pieces are gone: parts of 10, 10, 10, 7, 3, 10, 10 and 4 rows"


@pytest.mark.usefixtures("small")
def test_units_may_differ_in_their_columns(tmp_path: Path) -> None:
    """Every part has the columns of all, in the order of the units, whatever order they came in."""
    found = Staging(tmp_path / "staging")
    found.add(rows(2, [25, 1], level=["high", "low"]))
    found.add(rows(1, [*range(2, 25)], level=[*range(2, 25)], author=["x"] * 23))
    found.add(rows(0, [0]))
    found.seal()
    first, last = found.take([0, 1, 2]), found.take([25, 24])
    assert first.schema == last.schema
    assert first.column_names == ["text", POSITION, UNIT, "level", "author"]
    assert first.column("level").to_pylist() == [None, "low", "2"]
    assert last.select(["level", "author"]).to_pylist() == [{"level": "high", "author": None}, {"level": "24", "author": "x"}]
