import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from fake_run import CURATED, SCORED, SOURCES, build_run

from finescope import storage
from finescope.analysis import frames
from finescope.analysis.frames import corpus_sources, frame_of, frames_of, manifests_of, sample_of, table, tables_of
from finescope.errors import UserError


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    local, remote = str(tmp_path_factory.mktemp("frames")), f"memory://{uuid.uuid4().hex}"
    for output in (local, remote):
        build_run(output, until="curate")
    return local, remote


def test_frames_are_the_files_that_the_manifests_name_local_and_in_memory(tmp_path: Path) -> None:
    local, remote = str(tmp_path / "run"), f"memory://{uuid.uuid4().hex}"
    for output in (local, remote):
        build_run(output, until="curate")
        # A crashed attempt leaves files: what no manifest names is not read.
        stray = storage.read_parquet(storage.join(output, "score/scores/part-000000.parquet"))
        storage.put_parquet(storage.join(output, "score/scores/part-000099.parquet"), stray)
        assert table(output, "scores").collect().height == SCORED
        assert table(output, "embeddings").collect()["latent_values"][0].to_list() == [1.0, 0.5]
    assert table(local, "curated").collect().equals(table(remote, "curated").collect())


@pytest.mark.parametrize(
    "query",
    [
        lambda frame: frame,
        lambda frame: frame.select(pl.len()),
        lambda frame: frame.filter(pl.col("score") > 0.3).select("doc_id"),
        lambda frame: frame.head(7),
        lambda frame: frame.slice(130, 9).select("row"),
        lambda frame: frame.head(150).filter(pl.col("seed") == 1),
        lambda frame: frame.filter(pl.col("seed") == 1).head(3),
        lambda frame: frame.group_by("seed").agg(pl.col("score").max(), pl.len()).sort("seed"),
        lambda frame: frame.top_k(5, by=["score", "doc_id"]),
        lambda frame: frame.select(pl.col("top_latents").explode()).unique().sort("top_latents"),
    ],
)
def test_a_query_of_an_object_store_gives_what_it_gives_of_a_local_disk(
    stores: tuple[str, str], query: Callable[[pl.LazyFrame], pl.LazyFrame]
) -> None:
    local, remote = (query(table(output, "scores")).collect() for output in stores)
    assert local.height > 0
    assert remote.equals(local)


def test_an_object_store_gives_the_columns_that_are_asked_for(stores: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str] | None] = []
    batches = frames._batches

    def watched(files: tuple[str, ...], schema: pa.Schema, columns: list[str] | None, *rest: Any) -> Iterator[pl.DataFrame]:
        asked.append(columns)
        return batches(files, schema, columns, *rest)

    monkeypatch.setattr(frames, "_batches", watched)
    table(stores[1], "scores").filter(pl.col("seed") == 0).select(pl.col("score").max()).collect()
    assert [sorted(columns or ["all"]) for columns in asked] == [["score", "seed"]]


@pytest.mark.parametrize("name", ["documents", "scores", "embeddings", "rejects", "metrics", "latents"])
def test_columns_are_those_of_the_schema(stores: tuple[str, str], name: str) -> None:
    for output in stores:
        schema = table(output, name).collect_schema()
        assert schema == pl.from_arrow(frames._TABLES[name][0].empty_table()).schema  # pyright: ignore[reportAttributeAccessIssue]


def test_tables_of_several_steps_stand_together_or_one_step_s_alone(stores: tuple[str, str]) -> None:
    assert table(stores[0], "rejects").collect().height == 8
    assert table(stores[0], "rejects", "curate").collect().height == 5


def test_a_sample_is_the_first_rows_of_some_files(stores: tuple[str, str]) -> None:
    manifests = manifests_of(stores[0])
    every = table(stores[0], "scores").collect()
    files = [file.rows for file in manifests["score"].tables["scores"].files]
    assert len(files) == 3
    assert sample_of(manifests["score"], "scores", 8, 1000).collect().equals(every)
    assert sample_of(manifests["score"], "scores", 2, 10).collect()["row"].to_list() == [
        *range(10),
        *range(files[0], files[0] + 10),
    ]
    assert sample_of(manifests["index"], "rejects", 2, 10).collect().height == 0


def test_a_table_without_files_has_its_columns_and_no_row(tmp_path: Path) -> None:
    manifests = build_run(str(tmp_path), until="index")
    assert manifests["index"].tables["rejects"].files == ()
    empty = frame_of(manifests["index"], "rejects").collect()
    assert (empty.height, empty.columns[:2]) == (0, ["doc_id", "step"])
    assert frames_of(manifests, "scores").collect().height == 0


def test_a_table_of_several_steps_stands_together(tmp_path: Path) -> None:
    manifests = build_run(str(tmp_path), until="curate")
    assert tables_of(str(tmp_path))["rejects"] == ("index", "embed", "curate")
    counts = frames_of(manifests, "rejects").collect()["step"].value_counts().sort("step").rows()
    assert counts == [("curate", 5), ("embed", 3)]
    assert manifests["curate"].rows_out == CURATED


@pytest.mark.parametrize(
    ("step", "name", "expected"),
    [
        ("score", "curated", "has no table 'curated'; its tables: scores"),
        ("prune", "importance", "step 'prune' is not done; `finescope run RECIPE --until prune`"),
        (None, "curated", "has no table 'curated': step 'curate' is not done; `finescope run RECIPE --until curate`"),
        (None, "control_rewrites", "step 'teach' is not done"),
        (None, "nothing", "no table is called 'nothing'; the tables: documents, latents"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, step: str | None, name: str, expected: str) -> None:
    build_run(str(tmp_path), until="score")
    with pytest.raises(UserError, match=expected):
        table(str(tmp_path), name, step)


def test_a_missing_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run at .*: it has no run\.json"):
        manifests_of(str(tmp_path))


def test_sources_of_the_corpus_are_a_fact_or_the_record_beside_the_run_or_unknown(tmp_path: Path) -> None:
    assert corpus_sources(build_run(str(tmp_path / "a"), until="index")) == SOURCES
    bare = build_run(str(tmp_path / "b"), until="index", source=False)
    assert corpus_sources(bare) == {}
    storage.put_json(str(tmp_path / "b/inputs/prepared.json"), {"target": "sympy", "by_package": {"sympy": 3}})
    assert corpus_sources(bare) == {"sympy": 3}
    assert corpus_sources({}) == {}


def test_analysis_and_show_import_neither_torch_nor_ray_nor_the_charts() -> None:
    code = (
        "import sys, finescope.show, finescope.analysis.digest\n"
        "assert not {'torch', 'ray', 'transformers', 'altair'} & set(sys.modules)\n"
        "import finescope.analysis.report\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_table_that_is_older_than_a_column_has_nulls_there(tmp_path: Path) -> None:
    for output in (str(tmp_path / "run"), f"memory://{uuid.uuid4().hex}"):
        build_run(output, until="index")
        (file,) = manifests_of(output)["index"].files("documents")
        storage.put_parquet(file, storage.read_parquet(file).drop_columns(["start"]))
        for found in (table(output, "documents"), sample_of(manifests_of(output)["index"], "documents", 1, 5)):
            assert found.collect_schema()["start"] == pl.Int64
            assert found.collect()["start"].null_count() == found.collect().height > 0


def test_paths_are_no_patterns(tmp_path: Path) -> None:
    for name in ("a[1]", "a*"):
        (tmp_path / name).mkdir()
        pl.DataFrame({"n": [name]}).write_parquet(tmp_path / name / "part.parquet")
    found = [frames.scan([str(tmp_path / name / "part.parquet")]).collect()["n"].to_list() for name in ("a[1]", "a*")]
    assert found == [["a[1]"], ["a*"]]
