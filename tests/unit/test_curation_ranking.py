import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finescope import schemas, storage
from finescope.curation import ranking
from finescope.curation.ranking import COLUMNS, Eligible, Ranking, located_rows

Row = tuple[str, float]


def put_scores(root: str, shards: list[list[Row]]) -> list[str]:
    """Shards of the `scores` table; the locator of a row says where it was put."""
    files = []
    for number, rows in enumerate(shards):
        places = [{"file": number, "row_group": 0, "row": at, "num_tokens": at + 1, "seed": at % 3} for at in range(len(rows))]
        found = [{"doc_id": d, "score": s, "top_latents": [1]} | place for (d, s), place in zip(rows, places, strict=True)]
        files.append(storage.join(root, f"part-{number:06d}.parquet"))
        storage.put_parquet(files[-1], pa.Table.from_pylist(found, schema=schemas.SCORES), row_group_size=4)
    return files


def naive(shards: list[list[Row]], threshold: float | None, most: int) -> list[Row]:
    rows = [row for rows in shards for row in rows if threshold is None or row[1] >= threshold]
    return sorted(rows, key=lambda row: (-row[1], row[0]))[:most]


def pairs(frame: pl.DataFrame) -> list[Row]:
    return list(zip(frame["doc_id"], frame["score"], strict=True))


_SCORES = st.sampled_from([-1.0, -0.25, -0.0, 0.0, 0.25, 0.25 + 2**-20, 0.5, 0.75, 1.0])


@given(
    st.lists(_SCORES, max_size=30),
    st.lists(st.integers(0, 30), max_size=3),
    st.sampled_from([None, 0.0, 0.5, 2.0]),
    st.integers(1, 35),
)
@settings(max_examples=25, deadline=None)
def test_the_exact_best_with_ties_by_id(scores: list[float], cuts: list[int], threshold: float | None, most: int):
    ids = np.random.default_rng(len(scores)).permutation(len(scores))
    rows = [(f"d{at:02d}", score) for at, score in zip(ids, scores, strict=True)]
    places = [0, *sorted(cuts), len(rows)]
    shards = [rows[start:end] for start, end in itertools.pairwise(places)]
    files = put_scores("memory://select-test", shards)
    counted = Ranking.of(files, Eligible(threshold))
    found = counted.best(most)
    assert pairs(found) == naive(shards, threshold, most)
    assert found.columns == COLUMNS
    assert counted.size == len(naive(shards, threshold, len(rows)))
    for doc_id, file, _, row, *_ in found.iter_rows():
        assert shards[file][row][0] == doc_id


def test_many_shards_are_reduced_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranking, "_ROWS_AT_A_TIME", 5)
    random = np.random.default_rng(0)
    shards = [[(f"{shard}-{at}", float(random.integers(0, 9))) for at in range(7)] for shard in range(12)]
    files = put_scores(str(tmp_path), shards)
    for most in (1, 10, 83, 84, 999):
        assert pairs(Ranking.of(files, Eligible()).best(most)) == naive(shards, None, most)


def test_keys_are_in_the_order_of_the_scores():
    scores = np.sort(np.concatenate([np.random.default_rng(0).normal(size=999), [-1, 0, 1, 1e-30, -1e30]])).astype(np.float32)
    keys = ranking._keys(scores)
    assert (np.diff(keys) >= 0).all()
    assert ranking._keys(np.array([-0.0], np.float32)) == ranking._keys(np.array([0.0], np.float32))


def test_the_ranking_of_some_seeds(tmp_path: Path):
    """The seed of a row is its place in its shard modulo three."""
    random = np.random.default_rng(0)
    shards = [[(f"{s}-{at}", float(random.integers(0, 9))) for at in range(11)] for s in range(5)]
    ranking = Ranking.of(put_scores(str(tmp_path), shards), Eligible(2.0))
    ranked = ranking.best(12)
    some = ranking.of_seeds(frozenset([0, 2]))
    of_them = [[row for at, row in enumerate(rows) if at % 3 != 1] for rows in shards]
    assert pairs(some.best(99)) == naive(of_them, 2.0, 99)
    assert some.size == len(naive(of_them, 2.0, 99))
    before = {doc_id for doc_id, _ in pairs(ranked)}
    left = [row for row in naive(of_them, 2.0, 99) if row[0] not in before]
    assert pairs(some.after(ranked, 5)) == left[:5]
    assert pairs(some.after(ranked, 99)) == left
    assert ranking.after(ranking.best(99), 5).is_empty()
    assert ranking.of_seeds(frozenset()).best(5).is_empty()


def test_how_many_reach_so_many_tokens(tmp_path: Path):
    """Shards of four rows with 1 to 4 tokens; from the best on: 4, 3, 2, 1, 4, 3, ..."""
    files = put_scores(str(tmp_path), [[(f"{s}{at}", 1 - 0.2 * s + 0.04 * at) for at in range(4)] for s in range(3)])
    counted = Ranking.of(files, Eligible())
    assert [counted.reaching(tokens) for tokens in (1, 4, 5, 10, 11, 14, 30, 31)] == [1, 1, 2, 4, 5, 5, 12, 12]
    assert Ranking.of(files, Eligible(0.95)).reaching(11) == 4, "those below the threshold count nowhere"


def test_threads_have_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(1)
    files = put_scores(str(tmp_path), [[(f"{s}-{at}", float(random.integers(0, 4))) for at in range(50)] for s in range(9)])
    found = []
    for readers in (1, 2, 9):
        monkeypatch.setattr(ranking, "_READERS", readers)
        found.append(Ranking.of(files, Eligible()).best(100))
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])


def test_rows_are_found_by_their_place(tmp_path: Path):
    files = put_scores(str(tmp_path), [[(f"{s}-{at}", 0.5) for at in range(10)] for s in range(3)])
    wanted = pl.DataFrame(
        {"file": [2, 0, 2, 1], "row_group": [0] * 4, "row": [9, 3, 0, 5]},
        schema={"file": pl.Int32, "row_group": pl.Int32, "row": pl.Int32},
    )
    found = located_rows(files, wanted, ["num_tokens", "doc_id"])
    assert found.to_pydict() == {"num_tokens": [10, 4, 1, 6], "doc_id": ["2-9", "0-3", "2-0", "1-5"]}


def test_from_the_counts_alone_it_is_known_how_low_the_best_lie():
    scores = np.random.default_rng(3).normal(size=400).astype(np.float32)
    files = put_scores("memory://lowest-test", [[(f"d{at:03d}", float(score)) for at, score in enumerate(scores)]])
    counted, falling = Ranking.of(files, Eligible()), np.sort(scores)[::-1]
    for most in (1, 7, 150, 250, 400):
        worst = falling[most - 1]
        assert worst - abs(worst) / 1000 <= counted.lowest(most) <= worst
    assert counted.lowest(250) < 0 < counted.lowest(150)
