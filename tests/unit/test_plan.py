import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from plan_inputs import DOCUMENTS, by_step, inputs_at, recipe_of
from tiny_models import saved_model
from typer.testing import CliRunner

from finescope import demo, pipeline, plan, schemas, steps, storage
from finescope.cli import app
from finescope.config import ALL_STEPS, STEPS, Recipe
from finescope.corpus import demo_inputs
from finescope.errors import ModelError, ResourceError
from finescope.manifest import TableFile
from finescope.plan import Cost, costs
from finescope.steps import Outcome


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs_at(tmp_path_factory.mktemp("plan"))


def test_every_step_has_its_cost(root: Path, tmp_path: Path):
    found = costs(recipe_of(root, tmp_path))
    assert [cost.step for cost in found] == list(STEPS)
    assert not any(cost.done for cost in found)
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"
    cost = by_step(found)
    assert cost["index"].documents == cost["embed"].documents == cost["score"].documents == DOCUMENTS
    assert cost["curate"].documents == 24
    assert cost["prune"].documents == 16
    for step in ("sae", "embed", "teach", "prune", "distill", "evaluate"):
        assert min(cost[step].tokens, cost[step].flops, cost[step].memory_bytes) > 0, step
    for step in ("sae", "embed", "score", "curate", "teach", "prune", "distill", "report"):
        assert cost[step].disk_bytes > 0, step
    # 32 of about 50 tokens a document are read.
    assert cost["embed"].tokens == DOCUMENTS * 32
    assert cost["sae"].tokens == 2000


def test_a_screen_spares_the_embedding(root: Path, tmp_path: Path):
    plain = by_step(costs(recipe_of(root, tmp_path)))

    def planned(**screen: float) -> dict[str, Cost]:
        values = recipe_of(root, tmp_path).model_dump() | {
            "screen": {"sample": 100, "audit": 5, "top": 0.2, "recall": 0.9} | screen
        }
        return by_step(costs(Recipe.model_validate(values)))

    assert list(planned()) == list(ALL_STEPS)
    assert planned()["embed"] == plain["embed"], "how many it takes is not known before"
    found = planned(share=0.25)
    assert (found["screen"].documents, found["embed"].documents, found["score"].documents) == (
        DOCUMENTS,
        DOCUMENTS // 4,
        DOCUMENTS // 4,
    )
    assert found["embed"].flops == plain["embed"].flops / 4
    assert found["screen"].tokens == 105 * 32, "the samples are embedded"
    recipe = Recipe.model_validate(recipe_of(root, tmp_path).model_dump() | {"screen": {}})
    for step in list(pipeline.steps_of(recipe).values())[:4]:
        facts = {"passed": 17} if step.name == "screen" else {}
        tables = {"documents": ()} if step.name == "index" else {}
        steps.run(step, str(tmp_path), lambda _, tables=tables, facts=facts: Outcome(tables=tables, facts=facts))
    assert by_step(costs(recipe))["embed"].documents == 17, "as many as passed"


def test_costs_follow_the_recipe(root: Path, tmp_path: Path):
    plain = by_step(costs(recipe_of(root, tmp_path)))

    def changed(**changes: Any) -> dict[str, Cost]:
        return by_step(costs(recipe_of(root, tmp_path, **changes)))

    limited = changed(corpus={"limit": 30})
    assert limited["embed"].documents == 30
    assert limited["embed"].flops == pytest.approx(plain["embed"].flops / 4)
    assert changed(distill={"control": False})["distill"].flops < plain["distill"].flops
    assert changed(distill={"learning_rate": 1.0})["teach"] == plain["teach"]
    assert changed(distill={"method": "full"})["distill"].memory_bytes > plain["distill"].memory_bytes
    assert changed(prune={"ratio": 0.75})["prune"].disk_bytes < plain["prune"].disk_bytes
    assert changed(sae={"layer": 3})["embed"].flops > plain["embed"].flops
    assert changed(sae={"path": str(root / "dictionary")})["sae"].flops == 0, "what is trained already costs nothing"
    assert DOCUMENTS * 50 <= changed(sae={"num_tokens": 10**12})["sae"].tokens <= DOCUMENTS * 55, "all that there is, once"


def test_what_a_teacher_costs(root: Path, tmp_path: Path):
    tokens = 24 * 2 * 32  # the curated documents and as many of the control's: 32 of about 50 tokens are trained on

    def taught(**distill: Any) -> Cost:
        return by_step(costs(recipe_of(root, tmp_path, distill={"rewrite_share": 0.5, **distill})))["teach"]

    plain, idle, reading = taught(), taught(rewrite=False), taught(rewrite=False, kl_weight=0.5)
    assert plain.documents == 48
    assert plain.tokens == 24 * (32 + 24), "half of them, 24 tokens written"
    assert (idle.tokens, idle.flops, reading.tokens) == (0, 0, tokens)
    assert reading.disk_bytes - idle.disk_bytes == tokens * (32 * 6 + 2)
    assert taught(rewrite=False, kl_weight=0.5, kl_top_k=2).disk_bytes == idle.disk_bytes + tokens * 14
    assert taught(rewrite=False, control=False).documents == 24
    saved_model(root / "teacher", "llama", num_layers=8)
    larger = taught(teacher=str(root / "teacher"))
    assert larger.tokens == plain.tokens
    assert larger.flops > plain.flops
    assert larger.memory_bytes > plain.memory_bytes
    assert taught(teacher="https://host/v1", teacher_model="m").flops == 0, "it computes elsewhere"
    with pytest.raises(ModelError, match=r"^distill\.teacher '/no/teacher': no such directory"):
        taught(teacher="/no/teacher")


def test_what_is_done_is_marked_and_no_longer_counted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(root, tmp_path)
    units = [{"file": "f", "row_group": at, "num_rows": 500, "bytes": 50_000, "etag": "e"} for at in range(2)]
    counted = {"documents": (TableFile(path="documents/part-000000.parquet", rows=2, bytes=1),)}
    storage.put_parquet(
        str(tmp_path / "index" / "documents" / "part-000000.parquet"), pa.Table.from_pylist(units, schema=schemas.DOCUMENTS)
    )
    for name in STEPS[:4]:
        outcome = Outcome(tables=counted if name == "index" else {})
        steps.run(pipeline.steps_of(recipe)[name], str(tmp_path), lambda step, outcome=outcome: outcome)
    monkeypatch.setattr(plan, "resolve", lambda corpus: pytest.fail("the corpus is listed though it has been counted"))
    found = costs(recipe)
    assert by_step(found)["embed"].documents == 1000
    assert by_step(found)["embed"].tokens == 1000 * 25, "100 bytes a document"
    assert [cost.step for cost in found if cost.done] == list(STEPS[:4])
    left = sum(cost.disk_bytes for cost in found[4:]) + by_step(found)["curate"].scratch_bytes
    monkeypatch.setattr(storage, "free_bytes", lambda uri: left)
    plan.check_resources(recipe)
    monkeypatch.setattr(storage, "free_bytes", lambda uri: left - 1)
    with pytest.raises(ResourceError):
        plan.check_resources(recipe)


def call(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture
def path(root: Path, tmp_path: Path) -> str:
    recipe = recipe_of(root, tmp_path / "run")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return str(tmp_path / "r.yaml")


def test_the_command_prints_the_plan(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "available_memory", lambda: None)
    lines = call("plan", path)[0].splitlines()
    assert lines[0].split() == ["step", "state", "documents", "tokens", "FLOPs", "peak", "memory", "disk"]
    assert [line.split()[0] for line in lines[1:]] == list(STEPS)
    assert all("to do" in line for line in lines[1:])
    found = json.loads(call("plan", path, "--json")[0])
    assert [Cost(**cost) for cost in found] == costs(plan_recipe(path))


def plan_recipe(path: str) -> Recipe:
    return Recipe.model_validate(yaml.safe_load(Path(path).read_text()))


def test_a_machine_that_is_too_small_is_exit_2_and_nothing_is_begun(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 1)
    for command in ("plan", "run"):
        _, error = call(command, path, code=2)
        assert error.startswith("finescope: step '")
    assert len(call("plan", path, code=2)[0].splitlines()) == len(STEPS) + 1, "the plan is shown all the same"
    assert not (Path(path).parent / "run").exists()


def test_inputs_that_finescope_makes_are_made_first(root: Path, path: str, monkeypatch: pytest.MonkeyPatch):
    def prepare(uri: str, reporter: object) -> None:
        shutil.copytree(root / "corpus", f"{uri}/corpus")

    monkeypatch.setattr(demo_inputs, "prepare", prepare)
    monkeypatch.setattr(plan, "available_memory", lambda: None)
    made = ["--set", "prepare=python-docs", "--set", "corpus.path='{output}/inputs/corpus/*.parquet'"]
    found = json.loads(call("plan", path, "--json", *made)[0])
    assert found[0]["documents"] == DOCUMENTS


def test_run_asks_the_plan_before_its_first_step(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Recipe] = []
    monkeypatch.setattr(plan, "check_resources", asked.append)
    recipe = recipe_of(root, tmp_path)
    demo.check_resources(recipe)
    assert asked == [recipe]
