import polars as pl
import pytest

from finescope.analysis import summaries

SCORES = pl.LazyFrame(
    {
        "doc_id": ["a", "b", "c", "d", "e"],
        "score": [0.9, 0.5, 0.5, 0.5, 0.1],
        "seed": [0, 1, 0, 0, 1],
        "top_latents": [[1, 2], [2], [2, 3], [4], []],
        "file": [0, 0, 1, 1, 1],
        "row_group": [0, 0, 0, 0, 1],
        "row": [0, 1, 0, 1, 0],
    },
    schema_overrides={"score": pl.Float32, "seed": pl.Int32},
)
CURATED = SCORES.filter(pl.col("doc_id").is_in(["a", "b", "c"])).select("doc_id", "score", "seed", source=pl.lit("x"))


def test_quantiles_are_scores_that_occur() -> None:
    found = dict(summaries.score_quantiles(SCORES).rows())
    assert found[0.0] == pytest.approx(0.1)
    assert found[0.5] == pytest.approx(0.5)
    assert found[1.0] == pytest.approx(0.9)


def test_histogram_counts_every_document_once() -> None:
    found = summaries.score_histogram(SCORES, CURATED, 4)
    assert found["scored"].to_list() == [1, 0, 3, 1]
    assert found["curated"].to_list() == [0, 0, 2, 1]
    assert (found["low"][0], found["high"][-1]) == (pytest.approx(0.1), pytest.approx(0.9))


def test_histogram_of_one_score_and_of_none() -> None:
    same = SCORES.filter(pl.col("score") == 0.5)
    assert summaries.score_histogram(same, same, 3)["scored"].to_list() == [3, 0, 0]
    assert summaries.score_histogram(SCORES.clear(), CURATED.clear(), 3).height == 0


def test_near_misses_break_ties_by_id_as_the_ranking_does() -> None:
    found = summaries.near_misses(SCORES, CURATED, 2)
    assert found.select("doc_id", "kept").rows() == [("b", True), ("c", True), ("d", False), ("e", False)]
    assert summaries.near_misses(SCORES, CURATED.clear(), 2).height == 0


def test_near_misses_leave_out_what_was_rejected_above_the_cut() -> None:
    without_b = CURATED.filter(pl.col("doc_id") != "b")
    assert summaries.near_misses(SCORES, without_b, 1)["doc_id"].to_list() == ["c", "d"]


def test_sources_compare_with_the_corpus_where_that_is_known() -> None:
    curated = pl.LazyFrame({"source": ["x", "x", "x", None]})
    found = summaries.sources(curated, {"x": 20, "y": 60, "(none)": 20})
    assert found.rows() == [("x", 3, 0.75, 20, 0.2), ("(none)", 1, 0.25, 20, 0.2), ("y", 0, 0.0, 60, 0.6)]
    assert summaries.sources(curated, {})["corpus_share"].to_list() == [None, None]
    assert summaries.sources(pl.LazyFrame({"text": ["t"]}), {"x": 1}).height == 0


def test_every_seed_is_listed_with_its_hits() -> None:
    found = summaries.seed_hits(CURATED, ["zero", "one", "two"])
    assert found.select("documents", "text").rows() == [(2, "zero"), (1, "one"), (0, "two")]
    assert found["mean"].to_list() == [pytest.approx(0.7), pytest.approx(0.5), None]


def test_near_misses_of_many_equal_scores_are_the_next_ids() -> None:
    ids = [f"d{at:02d}" for at in range(40)]
    same = pl.LazyFrame({name: [0] * 40 for name in summaries.NEAR} | {"doc_id": ids, "score": [0.5] * 39 + [0.4]})
    found = summaries.near_misses(same, same.filter(pl.col("doc_id") <= "d30"), 3)
    assert found["doc_id"].to_list() == ["d28", "d29", "d30", "d31", "d32", "d33"]


def test_top_latents_are_those_of_the_curated_that_others_lack() -> None:
    found = summaries.top_latents(SCORES, CURATED, SCORES, 4)
    # Of three curated documents and of all five: 2 in 3 and 3, 1 and 3 in one and one.
    assert found.select("latent", "documents").rows() == [(2, 3), (1, 1), (3, 1)]
    assert found["share"].to_list() == pytest.approx([1.0, 1 / 3, 1 / 3])
    assert found["background_share"].to_list() == pytest.approx([0.6, 0.2, 0.2])
    assert found["lift"].to_list() == pytest.approx([5 / 3] * 3)
    # A latent of everything says nothing; one that the background lacks counts there as half a document.
    everywhere = SCORES.with_columns(top_latents=pl.lit([2], pl.List(pl.Int64)))
    found = summaries.top_latents(SCORES, CURATED, everywhere, 4)
    assert found["latent"].to_list() == [1, 3, 2]
    assert found["lift"].to_list() == pytest.approx([1 / 3 / 0.1, 1 / 3 / 0.1, 1.0])


def test_curves_number_the_points_of_each_metric() -> None:
    metrics = pl.LazyFrame({"step": ["s"] * 4, "name": ["loss", "lr", "loss", "other"], "value": [3.0, 1.0, 2.0, 9.0]})
    assert summaries.curves(metrics, ["loss", "lr"]).rows() == [("loss", 1, 3.0), ("lr", 1, 1.0), ("loss", 2, 2.0)]
    # What was recorded with the second loss alone stands there.
    assert summaries.curves(metrics, ["loss", "other"], "loss").rows() == [("loss", 1, 3.0), ("loss", 2, 2.0), ("other", 2, 9.0)]
    assert summaries.last_metrics(metrics).rows()[0] == ("s", "loss", 2, 3.0, 2.0)


def test_rejects_and_rewrites_by_reason() -> None:
    rejects = pl.LazyFrame({"step": ["e", "e", "c"], "reason": ["empty", "empty", "dup"], "detail": [None, "first", "of a"]})
    assert summaries.rejects_by_reason(rejects).rows() == [("e", "empty", 2, "first"), ("c", "dup", 1, "of a")]
    rewrites = pl.LazyFrame({"used": ["rewrite"] * 3 + ["original"], "reason": [None, None, "", "short"]})
    assert summaries.rewrites_by_reason(rewrites).rows() == [("rewrite", "", 3, 0.75), ("original", "short", 1, 0.25)]
