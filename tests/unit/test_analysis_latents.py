from pathlib import Path

import polars as pl
import pytest
from fake_run import build_run
from hypothesis import given
from hypothesis import strategies as st

from finescope.analysis import latents
from finescope.analysis.digest import digest
from finescope.analysis.frames import frames_of


def _table(**frequencies: list[float]) -> pl.LazyFrame:
    rows = [
        {"dictionary": name, "latent": latent, "frequency": value}
        | {"mean_activation": 1.0 if value else None, "max_activation": 2.0 if value else None}
        for name, values in frequencies.items()
        for latent, value in enumerate(values)
    ]
    return pl.LazyFrame(rows, infer_schema_length=None)


def test_dictionaries_by_hand() -> None:
    found = latents.dictionaries(_table(main=[0.0, 0.1, 0.5, 0.2], a=[1.0, 0.0]))
    assert found.to_dicts() == [
        {"dictionary": "main", "latents": 4, "l0": pytest.approx(0.8), "median_frequency": 0.2}
        | {"dead": 1, "dead_share": 0.25, "dense": 2, "dense_share": 0.5},
        {"dictionary": "a", "latents": 2, "l0": 1.0, "median_frequency": 1.0}
        | {"dead": 1, "dead_share": 0.5, "dense": 1, "dense_share": 0.5},
    ]


def test_histogram_by_hand() -> None:
    found = latents.frequency_histogram(_table(main=[0.0, 0.01, 0.05, 0.1, 0.999, 1.0], a=[0.002]), 1)
    assert found.rows() == [
        ("main", pytest.approx(1e-2), pytest.approx(1e-1), 2),
        ("main", pytest.approx(1e-1), 1.0, 3),
        ("a", pytest.approx(1e-3), pytest.approx(1e-2), 1),
    ]


@given(st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=50), st.integers(1, 8))
def test_every_live_latent_is_in_one_interval(frequencies: list[float], per_decade: int) -> None:
    found = latents.frequency_histogram(_table(main=[*frequencies, 0.0]), per_decade)
    assert found["latents"].sum() == len(frequencies)
    assert found["low"].is_unique().all()
    for low, high, count in found.select("low", "high", "latents").iter_rows():
        assert high / low == pytest.approx(10 ** (1 / per_decade))
        inside = sum(low * (1 - 1e-12) <= value <= high * (1 + 1e-12) for value in frequencies)
        assert inside >= count


def test_most_and_least_frequent_of_each_dictionary() -> None:
    table = _table(main=[0.0, 0.1, 0.5, 0.2, 0.2], a=[1.0, 0.0])
    most = latents.most_frequent(table, 2)
    assert most.select("dictionary", "latent", "dense").rows() == [("main", 2, True), ("main", 3, True), ("a", 0, True)]
    least = latents.least_frequent(table, 2)
    assert least.select("dictionary", "latent", "frequency").rows() == [("main", 1, 0.1), ("main", 3, 0.2), ("a", 0, 1.0)]


def test_all_dead() -> None:
    table = _table(main=[0.0, 0.0])
    assert latents.dictionaries(table)["median_frequency"].to_list() == [None]
    assert latents.frequency_histogram(table, 4).is_empty()
    assert latents.most_frequent(table, 3).is_empty()


def test_inspect_of_a_run_with_and_without_the_table(tmp_path: Path) -> None:
    manifests = build_run(str(tmp_path / "new"), until="sae")
    found = digest(manifests, "latents")
    assert found["dictionaries"]["dictionary"].to_list() == ["main", "wide"]
    assert found["most frequent latents"].row(0, named=True)["frequency"] == 1.0
    assert found["least frequent live latents"]["frequency"].min() == 1 / 20_000
    old = build_run(str(tmp_path / "old"), until="sae", sae="old")
    assert digest(old, "latents") == {}
    assert frames_of(old, "latents").collect().columns == frames_of(manifests, "latents").collect_schema().names()
