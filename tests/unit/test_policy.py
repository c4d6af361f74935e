"""The rules of the house that a program can check."""

import ast
import functools
import re
from pathlib import Path

import pytest
import typer.main
import yaml

from finescope import recipe
from finescope.cli import app
from finescope.config import STEPS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("finescope", "ray_jobs", "tests")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
RECIPES = sorted([*(ROOT / "ray_jobs" / "recipes").glob("*.yaml"), *(ROOT / "finescope").rglob("*.yaml")])
# What is text and goes out of the house.
SHIPPED = sorted(
    path
    for pattern in ("*.md", "*.toml", "*.txt", "Makefile", "Dockerfile", ".ci/run", "docs/**/*.md", "cluster/**/*.yaml")
    for path in ROOT.glob(pattern)
)
MOST_LINES, MOST_FUNCTION_LINES = 300, 60
# Directories of the machines that this is written on. Written so that this line is not one of them.
_DEVELOPERS = re.compile(r"(?<![\w.-])/(?:work|Users|tmp/v|home/(?!ray\b|user\b|finescope\b)\w+)(?:/|\b)")

# They name such directories to look for them.
_CHECKERS = (Path(__file__), ROOT / "tests" / "contracts" / "test_cluster_files.py")

# The contract's table of commands, each with the options that it names.
COMMANDS = {
    "demo": {"--out"},
    "init": set(),
    "plan": set(),
    "run": {"--until", "--set"},
    "status": {"--json"},
    "inspect": set(),
    "report": set(),
    "check-model": set(),
    "export": {"--format", "--to"},
    "submit": {"--address"},
}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check():
    assert len(MODULES) > 80
    assert len(RECIPES) >= 5
    assert {"README.md", "Makefile", ".ci/run", "cluster/aws.yaml"} <= {name_of(path) for path in SHIPPED}


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_short(folder: str):
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: lines for name, lines in lengths.items() if name.startswith(folder) and lines > MOST_LINES} == {}


def long_functions(tree: ast.Module) -> list[tuple[str, int]]:
    """Functions, with their decorators, of more lines than are allowed."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or node.lineno) - first + 1
            found += [(node.name, lines)] if lines > MOST_FUNCTION_LINES else []
    return found


def test_functions_are_short():
    found = {name_of(path): long for path in MODULES if (long := long_functions(tree_of(path)))}
    assert found == {}


def test_a_long_function_is_seen():
    body = "    pass\n" * MOST_FUNCTION_LINES
    assert long_functions(ast.parse(f"class A:\n  async def f(self):\n{body}")) == [("f", MOST_FUNCTION_LINES + 1)]
    assert long_functions(ast.parse("def f():\n" + "    pass\n" * (MOST_FUNCTION_LINES - 1))) == []


def test_packages_are_empty_and_nothing_is_called_utils():
    assert [name_of(path) for path in MODULES if path.name == "__init__.py" and path.read_text(encoding="utf-8")] == []
    parts = {part.removesuffix(".py") for path in MODULES for part in path.relative_to(ROOT).parts}
    assert parts & {"utils", "util", "helpers", "common", "misc"} == set()


def test_every_module_says_what_it_is_for():
    missing = [
        name_of(path)
        for path in MODULES
        if not name_of(path).startswith("tests/") and path.name != "__init__.py"
        if not ast.get_docstring(tree_of(path))
    ]
    assert missing == []


def test_no_path_of_a_developers_machine():
    paths = [*MODULES, *RECIPES, *SHIPPED, *(ROOT / "finescope").rglob("*.jinja")]
    found = {name_of(path): _DEVELOPERS.findall(path.read_text(encoding="utf-8")) for path in paths if path not in _CHECKERS}
    assert {name: hits for name, hits in found.items() if hits} == {}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("see /work/shared/x", True),
        ("'/home/anna/x'", True),
        ("/Users/x", True),
        ("/home/ray/x", False),
        ("runs/work/x", False),
        ("s3://b/work/x", False),
        ("/workspace/x", False),
    ],
)
def test_such_a_path_is_seen(text: str, seen: bool):
    assert bool(_DEVELOPERS.search(text)) == seen


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_shipped_recipes_are_valid(path: Path):
    recipe.load(str(path))


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.suffix == ".md"], ids=name_of)
def test_recipes_in_the_documentation_are_valid(path: Path):
    for text in fences(path.read_text(encoding="utf-8"), "ya?ml"):
        if "output" in (yaml.safe_load(text) or {}):
            recipe.parse(text, path.name)


def test_the_readme_shows_a_recipe():
    shown = fences((ROOT / "README.md").read_text(encoding="utf-8"), "ya?ml")
    assert len([text for text in shown if "output" in yaml.safe_load(text)]) >= 1


def test_the_demo_is_one_recipe():
    """Once in the wheel for `finescope demo`, once among the recipes for a Ray job."""
    inside, outside = ROOT / "finescope" / "demo.yaml", ROOT / "ray_jobs" / "recipes" / "demo.yaml"
    assert inside.read_bytes() == outside.read_bytes()


def test_commands_are_those_of_the_contract():
    group = typer.main.get_group(app)
    assert list(group.commands) == list(COMMANDS)
    for name, options in COMMANDS.items():
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert options | {"--verbose"} <= known, name
        assert group.commands[name].help


def test_the_steps_are_those_of_the_contract_and_two_more():
    assert [step for step in STEPS if step not in ("model", "teach")] == [
        *("index", "sae", "embed", "score", "curate"),
        *("prune", "distill", "evaluate", "report"),
    ]
