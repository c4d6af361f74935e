"""Several domains on the same embeddings, on a tiny model: what each has of its own, and that none is done twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from cli_runs import finescope, stamps, write_recipe
from tiny_run import recipe_values, write_inputs

from finescope.analysis.frames import table


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and a run of one domain up to `curate` in runs/one."""
    root = write_inputs(tmp_path_factory.mktemp("domains"))
    assert run(root, "one", {"path": str(root / "target.jsonl")}).code == 0
    return root


def run(root: Path, name: str, seeds: Any, until: str = "curate"):
    values = {**recipe_values(root, name), "seeds": seeds, "evaluate": {}}
    return finescope("run", write_recipe(root / f"{name}.yaml", values), "--until", until)


def copied(root: Path, name: str) -> Path:
    """The run of one domain again, in a directory of its own."""
    shutil.copytree(root / "runs" / "one", root / "runs" / name)
    return root / "runs" / name


def status(output: Path) -> dict[str, Any]:
    return json.loads(finescope("status", str(output), "--json").out)["steps"]


def doc_ids(output: Path, step: str) -> list[str]:
    return pq.read_table(output / step / "curated").column("doc_id").to_pylist()


def test_a_second_domain_starts_at_score_and_leaves_the_first_as_it_is(root: Path):
    output = copied(root, "two")
    before = stamps(output)
    seeds = {"maths": str(root / "target.jsonl"), "cooking": str(root / "general.jsonl")}
    ended = run(root, "two", seeds)
    assert ended.code == 0, ended.err
    after = stamps(output)
    changed = {name for name in after if after[name] != before.get(name) and not name.startswith(("score-", "curate-"))}
    assert changed <= {"run.json"}, "embeddings and the first domain are taken as they are, under its new name"
    steps = status(output)
    found = {name: step["path"] for name, step in steps.items() if step["state"] == "done"}
    shared = {name: name for name in ("index", "model", "sae", "embed")}
    own = {"score-maths": "score", "curate-maths": "curate", "score-cooking": "score-cooking", "curate-cooking": "curate-cooking"}
    assert found == shared | own
    assert {"prune-maths", "report-cooking"} <= steps.keys()
    assert "score" not in steps
    assert doc_ids(output, "curate") == doc_ids(root / "runs" / "one", "curate")
    kinds = table(str(output), "curated", "curate-cooking").collect()["source"].to_list()
    assert kinds.count("cooking") > 20
    manifest = json.loads((output / "score-cooking" / "manifest.json").read_text())
    assert (manifest["step"], manifest["domain"]) == ("score", "cooking")
    again = run(root, "two", seeds)
    assert "nothing to do: all 8 steps" in again.err
    assert stamps(output) == after
    back = run(root, "two", {"path": str(root / "target.jsonl")})
    assert "nothing to do: all 6 steps" in back.err, "and the other way round"


def test_domains_from_the_start_are_those_of_runs_of_their_own(root: Path):
    output = root / "runs" / "three"
    shutil.copytree(root / "runs" / "one", output, ignore=shutil.ignore_patterns("score", "curate", "run.json"))
    seeds = {"cooking": str(root / "general.jsonl"), "maths": str(root / "target.jsonl")}
    assert run(root, "three", seeds).code == 0
    assert {path.name for path in output.iterdir() if "-" in path.name} == {
        f"{step}-{domain}" for step in ("score", "curate") for domain in seeds
    }
    assert doc_ids(output, "curate-maths") == doc_ids(root / "runs" / "one", "curate")
    shown = json.loads(finescope("inspect", str(output), "--json").out)
    assert {"score quantiles (maths)", "score quantiles (cooking)", "seeds (maths)"} <= shown["summaries"].keys()
    assert {row["step"] for row in shown["tables"] if row["table"] == "scores"} == {"score-maths", "score-cooking"}
    paths = finescope("report", str(output)).out.split()
    assert [Path(path).parent.name for path in paths] == ["report-cooking", "report-maths"]
    pages = [Path(path).read_text() for path in paths]
    assert pages[0] != pages[1]
    planned = json.loads(finescope("plan", str(root / "three.yaml"), "--json").out)
    assert [cost["step"] for cost in planned if cost["done"]] == [
        "index",
        "model",
        "sae",
        "embed",
        *(f"{step}-{domain}" for step in ("score", "curate") for domain in seeds),
    ]


def test_a_domain_with_a_bad_seed_is_named_before_the_dear_steps(root: Path):
    (root / "short.jsonl").write_text('{"text": "sum"}\n')
    ended = run(root, "bad", {"maths": str(root / "target.jsonl"), "short": str(root / "short.jsonl")})
    assert ended.code == 2
    assert "seeds.short: " in ended.errors[0]
    assert "seed 1 has 1 token" in ended.errors[0]
    assert not (root / "runs" / "bad" / "embed").exists()


@pytest.mark.parametrize("weighting", ["none", "contrast"])
def test_every_weighting_scores_the_same_documents(root: Path, weighting: str):
    output = copied(root, weighting)
    values = {**recipe_values(root, weighting), "seeds": {"path": str(root / "target.jsonl")}, "evaluate": {}}
    values["score"] = {"similarity": "max", "weighting": weighting}
    recipe = write_recipe(root / f"{weighting}.yaml", values)
    assert finescope("run", recipe, "--until", "curate").code == 0
    path = status(output)["curate"]["path"]
    assert path.startswith("curate-"), "another identity beside the first"
    kinds = table(str(output), "curated", "curate").collect()["source"].to_list()
    assert kinds.count("maths") > 12, "a quarter of the corpus, so 6 of 24 by chance"
