import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from fake_run import CURATED, SCORED, SOURCES, build_run

from finescope import storage
from finescope.analysis.frames import corpus_sources, frame_of, frames_of, manifests_of, table, tables_of
from finescope.errors import UserError


def test_frames_are_the_files_that_the_manifests_name_local_and_in_memory(tmp_path: Path) -> None:
    local, remote = str(tmp_path / "run"), f"memory://{uuid.uuid4().hex}"
    for output in (local, remote):
        build_run(output, until="curate")
        # A crashed attempt leaves files: what no manifest names is not read.
        stray = storage.read_parquet(storage.join(output, "score/scores/part-000000.parquet"))
        storage.put_parquet(storage.join(output, "score/scores/part-000099.parquet"), stray)
        assert table(output, "score", "scores").collect().height == SCORED
        assert table(output, "embed", "embeddings").collect()["latent_values"][0].to_list() == [1.0, 0.5]
    assert table(local, "curate", "curated").collect().equals(table(remote, "curate", "curated").collect())


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
    ("step", "name", "expected"), [("score", "curated", "scores"), ("prune", "importance", "has not done step 'prune'")]
)
def test_what_is_not_there_is_named(tmp_path: Path, step: str, name: str, expected: str) -> None:
    build_run(str(tmp_path), until="score")
    with pytest.raises(UserError, match=expected):
        table(str(tmp_path), step, name)


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
