import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finescope import schemas, storage
from finescope.config import CurateSection
from finescope.corpus.decontaminate import NgramIndex
from finescope.curation import select
from finescope.curation.select import Selection, candidates, windows

Row = tuple[str, float]


def put_scores(root: str, shards: list[list[Row]]) -> list[str]:
    """Shards of the `scores` table; the locator of a row says where it was put."""
    files = []
    for number, rows in enumerate(shards):
        places = [{"file": number, "row_group": 0, "row": at, "num_tokens": 9, "seed": at % 3} for at in range(len(rows))]
        found = [{"doc_id": d, "score": s, "top_latents": [1]} | place for (d, s), place in zip(rows, places, strict=True)]
        files.append(storage.join(root, f"part-{number:06d}.parquet"))
        storage.put_parquet(files[-1], pa.Table.from_pylist(found, schema=schemas.SCORES))
    return files


def naive(shards: list[list[Row]], threshold: float | None, most: int) -> list[Row]:
    rows = [row for rows in shards for row in rows if threshold is None or row[1] >= threshold]
    return sorted(rows, key=lambda row: (-row[1], row[0]))[:most]


def pairs(frame: pl.DataFrame) -> list[Row]:
    return list(zip(frame["doc_id"], frame["score"], strict=True))


_SCORES = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0])


@given(
    st.lists(_SCORES, max_size=30),
    st.lists(st.integers(0, 30), max_size=3),
    st.sampled_from([None, 0.0, 0.5, 2.0]),
    st.integers(1, 35),
)
@settings(max_examples=40, deadline=None)
def test_the_exact_best_with_ties_by_id(scores: list[float], cuts: list[int], threshold: float | None, most: int):
    ids = np.random.default_rng(len(scores)).permutation(len(scores))
    rows = [(f"d{at:02d}", score) for at, score in zip(ids, scores, strict=True)]
    places = [0, *sorted(cuts), len(rows)]
    shards = [rows[start:end] for start, end in itertools.pairwise(places)]
    files = put_scores("memory://select-test", shards)
    found = candidates(files, threshold, most)
    assert pairs(found) == naive(shards, threshold, most)
    assert found.columns == ["doc_id", "file", "row_group", "row", "score", "seed"]
    for doc_id, file, _, row, *_ in found.iter_rows():
        assert shards[file][row][0] == doc_id


def test_many_shards_are_reduced_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select, "_ROWS_AT_A_TIME", 5)
    random = np.random.default_rng(0)
    shards = [[(f"{shard}-{at}", float(random.integers(0, 9))) for at in range(7)] for shard in range(12)]
    files = put_scores(str(tmp_path), shards)
    for most in (1, 10, 83, 84, 999):
        assert pairs(candidates(files, None, most)) == naive(shards, None, most)


@pytest.mark.parametrize(("total", "first"), [(0, 3), (1, 3), (3, 3), (10, 2), (1000, 7)])
def test_windows_cover_a_ranking_once(total: int, first: int):
    spans = list(windows(total, first))
    assert [at for start, end in spans for at in range(start, end)] == list(range(total))
    assert spans[:1] == [(0, min(first, total))][: len(spans)]
    assert all(end - start == first * 2**number for number, (start, end) in enumerate(spans[:-1]))


def offered(section: CurateSection, documents: list[tuple[int, str]], ngrams: NgramIndex | None = None) -> Selection:
    selection = Selection(section, ngrams)
    for position, (seed, text) in enumerate(documents):
        selection.offer(position, f"d{position}", seed, text)
    return selection


EVALUATION = NgramIndex.build(["what is the sum of one and two and three and four and five"])
LEAKED = "Answer me: What is the sum of one and two and three and four and five?"


def test_what_passes_is_kept():
    selection = offered(CurateSection(documents=2), [(0, "a"), (0, "b")])
    assert (selection.kept, selection.rejected, selection.full) == ([0, 1], [], True)
    assert not offered(CurateSection(documents=2), [(0, "a")]).full


def test_a_duplicate_names_the_better_one():
    documents = [(0, "One  text"), (1, "another"), (2, "one text\n"), (0, "ONE TEXT")]
    selection = offered(CurateSection(), documents)
    assert selection.kept == [0, 1]
    assert selection.rejected == [(2, "duplicate", "of d0"), (3, "duplicate", "of d0")]
    assert offered(CurateSection(deduplicate=False), documents).kept == [0, 1, 2, 3]


def test_an_empty_id_is_an_id():
    selection = Selection(CurateSection(), None)
    selection.offer(0, "", 0, "text")
    selection.offer(1, "b", 0, "text")
    assert selection.rejected == [(1, "duplicate", "of ")]


def test_contaminated_names_the_item():
    selection = offered(CurateSection(), [(0, LEAKED), (0, "what is the sum of six")], EVALUATION)
    assert selection.kept == [1]
    ((position, reason, detail),) = selection.rejected
    assert (position, reason) == (0, "contaminated")
    assert detail.startswith("item 0: what is the sum of one")


def test_a_seed_has_its_quota_of_what_is_kept():
    documents = [(0, LEAKED), (0, "a"), (0, "b"), (0, "c"), (1, "d"), (0, "e")]
    selection = offered(CurateSection(per_seed=2), documents, EVALUATION)
    assert selection.kept == [1, 2, 4]
    assert [(position, reason) for position, reason, _ in selection.rejected[1:]] == [(3, "per_seed"), (5, "per_seed")]
    assert selection.rejected[1][2] == "seed 0 has its 2 documents"


def test_the_first_reason_counts():
    """duplicate, then contaminated, then per_seed."""
    section = CurateSection(per_seed=1)
    selection = offered(section, [(0, "a"), (0, "A"), (0, LEAKED), (0, "b"), (1, "b")], EVALUATION)
    assert [reason for _, reason, _ in selection.rejected] == ["duplicate", "contaminated", "per_seed"]
    assert selection.kept == [0, 4], "a document that was rejected makes no other a duplicate"
