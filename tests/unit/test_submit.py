import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finescope import submit
from finescope.errors import RecipeError, ResourceError
from finescope.scaffold import write_example

ADDRESS = "http://head:8265"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a recipe in `jobs/`."""
    monkeypatch.chdir(tmp_path)
    write_example(tmp_path / "jobs")
    return tmp_path


def entry(command: list[str]) -> list[str]:
    return command[command.index("--") + 1 :]


def test_the_command(here: Path):
    ray, *rest = submit.command("jobs/recipe.yaml", ADDRESS, [])
    assert Path(ray).name == "ray"
    assert rest[:7] == ["job", "submit", "--address", ADDRESS, "--working-dir", ".", "--"]
    assert entry(rest) == ["finescope", "run", "jobs/recipe.yaml", "--set", "compute.runner=ray"]


def test_overrides_follow_the_runner_so_that_they_win(here: Path):
    found = entry(submit.command("jobs/recipe.yaml", ADDRESS, ["prune.ratio=0.5", "evaluate.target=[a b, c]"]))
    assert found[3:] == ["--set", "compute.runner=ray", "--set", "prune.ratio=0.5", "--set", "evaluate.target=[a b, c]"]


@pytest.mark.parametrize("name", ["{here}/jobs/recipe.yaml", "./jobs/recipe.yaml", "jobs/../jobs/recipe.yaml"])
def test_the_path_is_made_relative(here: Path, name: str):
    assert entry(submit.command(name.format(here=here), ADDRESS, []))[2] == "jobs/recipe.yaml"


def test_a_recipe_outside_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch):
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    for name in ("../jobs/recipe.yaml", str(here / "jobs" / "recipe.yaml")):
        with pytest.raises(RecipeError, match="is not below the current directory"):
            submit.command(name, ADDRESS, [])


def test_no_ray_command(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    with pytest.raises(ResourceError, match="the `ray` command is not on the path"):
        submit.command("jobs/recipe.yaml", ADDRESS, [])
    monkeypatch.setattr(submit.shutil, "which", lambda name: "/usr/bin/ray")
    assert submit.command("jobs/recipe.yaml", ADDRESS, [])[0] == "/usr/bin/ray"


def test_the_jobs_exit_code_is_ours(here: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[list[str]] = []

    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(submit.subprocess, "run", run)
    assert submit.submit_recipe("jobs/recipe.yaml", ADDRESS, ["prune.ratio=0.5"]) == 7
    assert calls == [submit.command("jobs/recipe.yaml", ADDRESS, ["prune.ratio=0.5"])]
    for recipe, overrides in (("jobs/recipe.yaml", ["prune.ration=1"]), ("jobs/none.yaml", [])):
        with pytest.raises(RecipeError):
            submit.submit_recipe(recipe, ADDRESS, overrides)
    assert len(calls) == 1, "nothing is submitted that would fail there"
