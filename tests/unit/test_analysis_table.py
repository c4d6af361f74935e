from pathlib import Path

from fake_run import build_run

from finescope.analysis.table import Row, closing_grid, shown


def test_the_grid_has_the_models_that_were_measured(tmp_path: Path) -> None:
    grid = closing_grid(build_run(str(tmp_path / "a")))
    assert grid.columns == ("base", "pruned", "recovered", "control")
    assert grid.value("perplexity, target", "recovered") == 11.9
    assert grid.value("perplexity, target", "nobody") is None
    assert grid.to_dict()["parameters"]["base"] == 134_515_008
    assert closing_grid(build_run(str(tmp_path / "b"), control=False)).columns == ("base", "pruned", "recovered")


def test_a_run_without_evaluation_has_no_rows(tmp_path: Path) -> None:
    assert closing_grid(build_run(str(tmp_path), until="prune")).rows == ()


def test_what_was_not_measured_is_a_dash_and_not_compared() -> None:
    row = Row("perplexity, target", "perplexity", (10.0, None, 12.0, 35.0))
    assert row.cells == ("10.00", "-", "12.00", "35.00")
    assert row.relative == ("", "", "+20 %", "3.5 times")


def test_figures_are_shown_with_their_units() -> None:
    assert [shown(value, "bytes") for value in (540_060_032, 2.5e9)] == ["540.1 MB", "2.50 GB"]
    assert [shown(value, "count") for value in (134_515_008, 740)] == ["134.5 M", "740"]
    assert [shown(value, "rate") for value in (17.84, 1176.2)] == ["17.8", "1,176"]
    assert shown(1.5e7, "perplexity") == "1.50e+07"
