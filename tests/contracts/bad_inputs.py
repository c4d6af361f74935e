"""What the tests of bad input share: a fixture's inputs, recipes with one thing wrong, and what an error must look like."""

from pathlib import Path
from typing import Any

from cli_runs import Ended, finescope, write_recipe
from tiny_run import recipe_values


class Case:
    """One recipe on the shared inputs, its output below `home`."""

    def __init__(self, inputs: Path, home: Path, **changes: Any) -> None:
        self.output = home / "run"
        self.recipe = home / "recipe.yaml"
        self.values = recipe_values(inputs, "unused", **changes) | {"output": str(self.output)}

    def run(self, *arguments: str, command: str = "run") -> Ended:
        """`finescope run` of it."""
        return finescope(command, write_recipe(self.recipe, self.values), *arguments)


def refused(ended: Ended, *said: str, code: int = 2) -> None:
    """It ended with this code and said these things in its first line of errors, without a traceback."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert ended.errors, ended.err
    for part in said:
        assert part in ended.errors[0]
    if code == 2:
        assert not any("log:" in line for line in ended.errors)
