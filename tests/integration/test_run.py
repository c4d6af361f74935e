"""A whole run with the local runner: what it leaves on disk, and that nothing is done twice."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import Finished, SilentReporter, ended, finescope, leftovers, stamps, start, states, write_recipe
from tiny_run import COOKING, recipe_values, sentence

from finescope import pipeline, schemas, storage
from finescope.config import STEPS, Recipe

_CURATED = pa.schema(
    [*schemas.CURATED_HEAD, ("id", pa.string()), ("source", pa.string()), *schemas.CURATED_TAIL],
)
_TABLES = {
    ("sae", "latents"): schemas.LATENTS,
    ("index", "documents"): schemas.DOCUMENTS,
    ("index", "rejects"): schemas.REJECTS,
    ("sae", "metrics"): schemas.METRICS,
    ("embed", "embeddings"): schemas.EMBEDDINGS,
    ("embed", "rejects"): schemas.REJECTS,
    ("score", "scores"): schemas.SCORES,
    ("curate", "curated"): _CURATED,
    ("curate", "rejects"): schemas.REJECTS,
    ("prune", "importance"): schemas.IMPORTANCE,
    ("prune", "head_latents"): schemas.HEAD_LATENTS,
    ("teach", "rewrites"): schemas.REWRITES,
    ("distill", "metrics"): schemas.METRICS,
    ("teach", "control_rewrites"): schemas.REWRITES,
    ("distill", "control_metrics"): schemas.METRICS,
    ("evaluate", "metrics"): schemas.METRICS,
}
# Loads the student with stock code alone, from a directory that has nothing of ours, and writes some tokens.
_GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("the sum of", return_tensors="pt")
made = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
ours = [name for name in sys.modules if name.split(".")[0] == "finescope"]
new = tokenizer.decode(made[0, prompt["input_ids"].shape[1]:])
print(json.dumps({"type": type(model).__name__, "new": new, "parameters": model.num_parameters(), "ours": ours}))
"""
_AGAIN = """
import sys
from finescope.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
print([name for name in ("torch", "ray", "transformers") if name in sys.modules])
"""


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_recorded_and_its_rows_add_up(finished: Finished, step: str) -> None:
    manifest = json.loads((finished.output / step / "manifest.json").read_text())
    assert manifest["step"] == step
    assert manifest["rows_in"] == manifest["rows_out"] + manifest["rejects"]
    for table in manifest["tables"].values():
        for file in table["files"]:
            path = finished.output / step / file["path"]
            assert (pq.ParquetFile(path).metadata.num_rows, path.stat().st_size) == (file["rows"], file["bytes"])
    assert states(finished.output)[step] == "done"


def test_counts_go_from_step_to_step(finished: Finished) -> None:
    manifests = finished.manifests
    documents = sum(row["num_rows"] for row in _rows(finished, "index", "documents"))
    assert documents == manifests["embed"].rows_in == 400
    assert manifests["score"].rows_in == manifests["embed"].rows_out
    assert manifests["distill"].rows_in == manifests["teach"].rows_in == manifests["curate"].rows_out == 24


def test_rows_of_every_unit_add_up(finished: Finished) -> None:
    units = _rows(finished, "index", "documents")
    records = sorted((finished.output / "embed" / "units").iterdir())
    assert len(records) == len(units) == 40
    for unit, path in zip(units, records, strict=True):
        record = json.loads(path.read_text())
        shard = finished.output / "embed" / "embeddings" / f"part-{record['unit']:06d}.parquet"
        assert record["rows_in"] == unit["num_rows"] == record["rows"] + record["rejects"]
        assert pq.ParquetFile(shard).metadata.num_rows == record["rows"]


@pytest.mark.parametrize(("step", "table"), _TABLES)
def test_tables_have_their_schema(finished: Finished, step: str, table: str) -> None:
    for file in finished.manifests[step].files(table):
        assert pq.read_schema(file).remove_metadata() == _TABLES[step, table]


def test_no_table_is_left_out_above(finished: Finished) -> None:
    assert {(step, table) for step, manifest in finished.manifests.items() for table in manifest.tables} == set(_TABLES)


def test_directories_of_tables_hold_parquet_and_nothing_else(finished: Finished) -> None:
    directories = {
        Path(file).parent
        for manifest in finished.manifests.values()
        for table in manifest.tables
        for file in manifest.files(table)
    }
    listed = {
        Path(file) for manifest in finished.manifests.values() for table in manifest.tables for file in manifest.files(table)
    }
    assert {path for directory in directories for path in directory.iterdir()} == listed
    assert {path.suffix for path in listed} == {".parquet"}
    assert leftovers(finished.output) == []


def test_curated_is_the_best_in_order(finished: Finished) -> None:
    curated = pl.scan_parquet(finished.output / "curate" / "curated" / "*.parquet").collect()
    assert curated.columns == _CURATED.names
    assert curated["rank"].to_list() == list(range(1, 25))
    scores = pl.scan_parquet(finished.output / "score" / "scores" / "*.parquet").collect()
    best = scores.sort(["score", "doc_id"], descending=[True, False])
    dropped = {row["doc_id"] for row in _rows(finished, "curate", "rejects")}
    expected = best.filter(~pl.col("doc_id").is_in(list(dropped))).head(24)
    assert curated.select("doc_id", "score", "seed").equals(expected.select("doc_id", "score", "seed"))
    corpus = pl.read_parquet(finished.root / "corpus" / "*.parquet").filter(pl.col("id").is_in(curated["doc_id"].to_list()))
    # The corpus's own `id` and `source` are carried; its `text` is the text.
    assert curated.select("id", "source", "text").sort("id").equals(corpus.select("id", "source", "text").sort("id"))


def test_curated_is_read_by_datasets(finished: Finished, tmp_path: Path) -> None:
    files = str(finished.output / "curate" / "curated" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))["train"]
    assert loaded.column_names == _CURATED.names
    assert loaded["doc_id"][:] == [row["doc_id"] for row in _rows(finished, "curate", "curated")]


@pytest.fixture(scope="module")
def student(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a process without anything of ours makes of the student."""
    command = [sys.executable, "-I", "-c", _GENERATE, str(finished.output / "distill" / "model")]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("elsewhere"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_student_loads_and_generates_without_our_code(student: dict[str, object]) -> None:
    assert student["type"] == "LlamaForCausalLM"
    assert len(str(student["new"]).split()) == 5
    assert student["ours"] == []


def test_the_student_is_smaller(finished: Finished, student: dict[str, object]) -> None:
    base = finished.manifests["model"].facts["reference"]
    facts = finished.manifests["prune"].facts
    assert student["parameters"] == facts["parameters_after"] < facts["parameters_before"] == base["num_parameters"]
    removed = facts["parameters_before"] - facts["parameters_after"]
    assert removed == pytest.approx(0.25 * base["block_parameters"], rel=0.15)


def test_the_student_is_of_a_stock_architecture(finished: Finished) -> None:
    config = json.loads((finished.output / "distill" / "model" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert "auto_map" not in config
    card = (finished.output / "distill" / "model" / "README.md").read_text()
    assert "base_model:" in card


def test_the_report_is_one_file(finished: Finished) -> None:
    page = (finished.output / "report" / "report.html").read_text()
    assert "recovered" in page
    assert re.findall(r"(?:src|href)=[\"']?https?://", page) == []


def test_a_second_run_does_nothing_and_imports_nothing_heavy(finished: Finished, tmp_path: Path) -> None:
    before = stamps(finished.output)
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(finished.root, "reference"))
    again = ended(start(["run", recipe], _AGAIN))
    assert again.code == 0, again.err
    assert "nothing to do: all 11 steps" in again.err
    assert again.out.splitlines()[-1] == "[]"
    assert stamps(finished.output) == before


def test_other_seeds_start_at_score(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished.output, output)
    before = stamps(output)
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(json.dumps({"text": sentence(COOKING, np.random.default_rng(5))}) + "\n")
    values = recipe_values(finished.root, "reference", seeds={"path": str(seeds)}) | {"output": str(output)}
    again = finescope("run", write_recipe(tmp_path / "recipe.yaml", values), "--until", "curate")
    assert again.code == 0, again.err
    after = stamps(output)
    changed = {name for name in after if after[name] != before.get(name)}
    (score,), (curate,) = (list(output.glob(f"{step}-*")) for step in ("score", "curate"))
    assert {name.split("/")[0] for name in changed} == {"run.json", score.name, curate.name}
    assert before.keys() <= after.keys()
    steps = json.loads((output / "run.json").read_text())["steps"]
    assert (steps["embed"]["path"], steps["score"]["path"], steps["curate"]["path"]) == ("embed", score.name, curate.name)
    sources = [pl.read_parquet(path / "curated" / "*.parquet")["source"].to_list() for path in (output / "curate", curate)]
    assert sources[0].count("maths") > 20
    assert sources[1].count("cooking") > 20


def test_until_ends_there_and_goes_on_from_there(finished: Finished, tmp_path: Path) -> None:
    values = recipe_values(finished.root, "until") | {"output": str(tmp_path / "run")}
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert finescope("run", recipe, "--until", "model").code == 0
    assert states(tmp_path / "run") == {"index": "done", "model": "done"}
    before = stamps(tmp_path / "run" / "index")
    assert finescope("run", recipe, "--until", "embed").code == 0
    assert list(states(tmp_path / "run")) == ["index", "model", "sae", "embed"]
    assert stamps(tmp_path / "run" / "index") == before
    assert not (tmp_path / "run" / "score").exists()
    refused = finescope("run", recipe, "--until", "embedding")
    assert refused.code == 2
    assert "--until embedding: no such step; steps: index, model, sae, embed" in refused.err


def test_a_run_goes_to_any_store(finished: Finished) -> None:
    values = recipe_values(finished.root, "memory") | {"output": "memory://tiny/run"}
    try:
        manifests = pipeline.run(Recipe.model_validate(values), SilentReporter(), until="curate")
        assert {storage.exists(storage.join("memory://tiny/run", step, "manifest.json")) for step in manifests} == {True}
        (there,) = manifests["curate"].files("curated")
        (here,) = finished.manifests["curate"].files("curated")
        assert storage.read_parquet(there).equals(storage.read_parquet(here))
    finally:
        fsspec.filesystem("memory").rm("/tiny", recursive=True)


def _rows(finished: Finished, step: str, table: str) -> list[dict[str, object]]:
    return [row for file in finished.manifests[step].files(table) for row in pq.read_table(file).to_pylist()]
