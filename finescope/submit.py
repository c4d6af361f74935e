"""`finescope submit`: the same run as a Ray job, through the `ray` command that comes with Ray.

A subprocess and not Ray's client: the command reads tokens and addresses as people who use Ray know it.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from finescope.errors import RecipeError, ResourceError
from finescope.recipe import load


def submit_recipe(recipe: str, address: str, overrides: Sequence[str]) -> int:
    """Submit and follow; returns the exit code of the job.

    Raises:
        RecipeError: the recipe is wrong, or not below the current directory, which is what the job is sent.
        ResourceError: the `ray` command is not there.
    """
    load(recipe, overrides)
    return subprocess.run(command(recipe, address, overrides), check=False).returncode


def command(recipe: str, address: str, overrides: Sequence[str]) -> list[str]:
    """The `ray job submit` command that runs `recipe` on the cluster at `address`."""
    path = Path(recipe)
    inside = path.resolve().is_relative_to(Path.cwd())
    if not inside:
        raise RecipeError(f"'{recipe}' is not below the current directory, which is what a job is sent; change to its directory")
    beside = Path(sys.executable).with_name("ray")
    ray = str(beside) if beside.exists() else shutil.which("ray")
    if ray is None:
        raise ResourceError("the `ray` command is not on the path; pip install 'ray[default]'")
    settings = [part for override in overrides for part in ("--set", override)]
    relative = path.resolve().relative_to(Path.cwd()).as_posix()
    entry = ["finescope", "run", relative, "--set", "compute.runner=ray", *settings]
    return [ray, "job", "submit", "--address", address, "--working-dir", ".", "--", *entry]
