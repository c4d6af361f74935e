"""Two rounds of pruning and training on a tiny model: what each makes of the other's, and that all readers of a run know them."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from cli_runs import Ended, finescope, stamps, write_recipe
from tiny_run import recipe_values, write_inputs
from transformers import AutoModelForCausalLM

RATIO = 0.58  # a third of the three blocks and some channels, twice
PRUNE = {"structure": ["blocks", "mlp"], "rounds": 2, "ratio": RATIO, "round_to": 4}


class Run:
    """A run that is done."""

    def __init__(self, root: Path, **changes: Any) -> None:
        values = recipe_values(root, "rounds", prune=PRUNE, **changes)
        self.recipe, self.output = write_recipe(root / "rounds.yaml", values), Path(values["output"])
        self.first = finescope("run", self.recipe, "--until", "prune-1")
        self.planned = finescope("plan", self.recipe, "--json")
        self.rest = finescope("run", self.recipe)

    def manifest(self, step: str) -> dict[str, Any]:
        return json.loads((self.output / step / "manifest.json").read_text())

    def facts(self, step: str) -> dict[str, Any]:
        return self.manifest(step)["facts"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(write_inputs(tmp_path_factory.mktemp("rounds")))
    for ended in (run.first, run.planned, run.rest):
        assert ended.code == 0, ended.err
    return run


def status(run: Run) -> dict[str, Any]:
    return json.loads(finescope("status", str(run.output), "--json").out)["steps"]


def test_the_steps_in_turns(done: Run) -> None:
    turns = ["prune-1", "distill-1", "prune", "distill", "evaluate", "report"]
    found = status(done)
    assert list(found)[-6:] == turns
    assert {step["state"] for step in found.values()} == {"done"}
    costs = json.loads(done.planned.out)
    assert [cost["step"] for cost in costs][-6:] == turns
    assert [cost["done"] for cost in costs][-6:] == [True, False, False, False, False, False]
    again = finescope("run", done.recipe)
    assert "nothing to do: all 13 steps" in again.err


def test_each_round_prunes_what_training_made_of_the_one_before(done: Run) -> None:
    base, first, last = done.facts("model")["reference"], done.facts("prune-1"), done.facts("prune")
    assert "of_input" not in first
    assert first["ratio"] == pytest.approx(1 - (1 - RATIO) ** 0.5)
    assert last["ratio"] == pytest.approx(RATIO)
    for facts in (first, last):
        assert facts["block_parameters_before"] == base["block_parameters"]
        assert facts["ratio_reached"] == pytest.approx(1 - facts["block_parameters_after"] / base["block_parameters"])
        assert facts["ratio_reached"] == pytest.approx(facts["ratio"], abs=0.06)
    of_input = last["of_input"]
    assert of_input["block_parameters_before"] == first["block_parameters_after"]
    assert of_input["ratio"] == pytest.approx(1 - (1 - RATIO) * base["block_parameters"] / first["block_parameters_after"])
    kept = 1 - of_input["ratio_reached"]
    assert kept * first["block_parameters_after"] == pytest.approx(last["block_parameters_after"])
    student = AutoModelForCausalLM.from_pretrained(done.output / "distill" / "model")
    assert student.num_parameters() == last["parameters_after"] < first["parameters_after"] < base["num_parameters"]
    assert student.config.num_hidden_layers == last["blocks_after"]


def test_every_card_names_the_model_that_was_given(done: Run) -> None:
    for step in ("prune-1", "distill-1", "prune", "distill"):
        assert "base_model: model\n" in (done.output / step / "model" / "README.md").read_text()


def test_documents_are_rewritten_once(done: Run) -> None:
    assert pq.read_table(done.output / "teach" / "rewrites").num_rows == 24
    assert done.manifest("distill-1")["rows_in"] == done.manifest("distill")["rows_in"] == 24
    told = [ended.err.count("teach: rewriting ...") for ended in (done.first, done.rest)]
    assert told == [1, 0], "the documents of both rounds and of the control"
    assert not (done.output / "distill-1" / "control").exists()
    assert (done.output / "distill" / "control" / "model").exists()


def test_all_that_reads_a_run_knows_the_rounds(done: Run, tmp_path: Path) -> None:
    models = done.facts("evaluate")["models"]
    assert list(models) == ["base", "pruned", "recovered", "control"]
    assert models["recovered"]["parameters"] == done.facts("prune")["parameters_after"]
    shown = json.loads(finescope("inspect", str(done.output), "--json").out)
    assert {row["step"] for row in shown["tables"] if row["table"] == "importance"} == {"prune-1", "prune"}
    last, first = shown["summaries"]["pruned groups"], shown["summaries"]["pruned groups (round 1)"]
    assert len({row["layer"] for row in last}) == done.facts("prune-1")["blocks_after"]
    assert sum(row["params_removed"] for row in last) == removed(done, "prune")
    assert sum(row["params_removed"] for row in first) == removed(done, "prune-1")
    page = (done.output / "report" / "report.html").read_text()
    assert all(step in page for step in ("prune-1", "distill-1", "removed of its input"))
    to = tmp_path / "student"
    assert exported(done, to).code == 0
    assert (to / "model.safetensors").read_bytes() == (done.output / "distill" / "model" / "model.safetensors").read_bytes()


def removed(run: Run, step: str) -> int:
    facts = run.facts(step)
    return facts.get("of_input", facts)["block_parameters_before"] - facts["block_parameters_after"]


def exported(run: Run, to: Path) -> Ended:
    return finescope("export", str(run.output), "--format", "hf", "--to", str(to))


def test_the_table_of_importance_has_a_row_a_block(done: Run) -> None:
    table = pl.read_parquet(done.output / "prune-1" / "importance" / "*.parquet").filter(kind="blocks")
    facts = done.facts("prune-1")["blocks"]
    assert table["layer"].to_list() == [1, 2, 3]
    assert table.filter(~pl.col("kept"))["layer"].to_list() == facts["removed"]
    assert table["importance"].to_list() == pytest.approx(facts["influences"], rel=1e-5)


def test_a_recipe_of_one_round_takes_nothing_of_these(done: Run, tmp_path: Path) -> None:
    before = stamps(done.output)
    again = finescope("plan", done.recipe, "--json", "--set", "prune.rounds=1")
    done_now = [cost["step"] for cost in json.loads(again.out) if cost["done"]]
    assert done_now == ["index", "model", "sae", "embed", "score", "curate", "teach"]
    assert "more than half of the blocks' parameters in one shot" in again.err
    assert "more than half" not in done.planned.err
    assert stamps(done.output) == before
