"""Runs of the command line in this process and in others, and snapshots of what is on disk."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from typer.testing import CliRunner

from finescope.cli import app
from finescope.config import Recipe
from finescope.manifest import Manifest
from finescope.runners.base import TrainProgress

REPOSITORY = Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines in which the command line says why it ends."""
        return [line for line in self.err.splitlines() if line.startswith("finescope: ")]


class Finished(NamedTuple):
    """A run that is done. Nobody writes into it: who must, copies it."""

    root: Path  # inputs; other runs may go to root/runs
    recipe: Recipe
    output: Path
    manifests: dict[str, Manifest]


class SilentReporter:
    """Tells nobody."""

    def task(self, name: str, total: int | None, unit: str) -> AbstractContextManager[TrainProgress]:
        """See `Reporter`."""
        return nullcontext(lambda amount, note="": None)

    def note(self, message: str) -> None:
        """See `Reporter`."""

    def warn(self, message: str) -> None:
        """See `Reporter`."""


def finescope(*arguments: str) -> Ended:
    """`finescope ARGUMENTS` in this process. An exception that is not its exit is the caller's to see."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return Ended(result.exit_code, result.stdout, result.stderr)


def write_recipe(path: Path, values: dict[str, Any]) -> str:
    """The recipe as a YAML file; returns its path."""
    path.write_text(yaml.safe_dump(values))
    return str(path)


def start(
    arguments: Sequence[str], code: str = "from finescope.cli import main; main()", **variables: str
) -> "subprocess.Popen[str]":
    """Python code, by default the command line, in a process of its own, with these variables in its environment."""
    command = [sys.executable, "-c", code, *arguments]
    # One thread, as in the run that it is compared with: sums of floats depend on their number.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(process: "subprocess.Popen[str]") -> Ended:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=300)
    return Ended(process.returncode, out, err)


def states(output: Path) -> dict[str, str]:
    """The steps in a run's record and their states."""
    record = json.loads((output / "run.json").read_text())
    return {name: step["state"] for name, step in record["steps"].items()}


def stamps(directory: Path) -> dict[str, int]:
    """When each file below `directory` was last changed (ns)."""
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def leftovers(directory: Path) -> list[Path]:
    """What a writer that was killed left, and working files that a finished step does not keep."""
    names = {"checkpoints", "ids"}
    return [path for path in directory.rglob("*") if path.name.startswith(".tmp-") or path.name in names]
