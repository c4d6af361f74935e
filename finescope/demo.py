"""`finescope demo`: the shipped recipe on what is installed, and the table that it ends with."""

import importlib.resources
from collections.abc import Sequence

from finescope import pipeline
from finescope.config import Recipe
from finescope.recipe import parse
from finescope.runners.base import Reporter
from finescope.show import closing_table

RECIPE = "demo.yaml"


def run(overrides: Sequence[str], reporter: Reporter) -> None:
    """Run the demo's recipe with `overrides` and print the closing table and the report's path."""
    text = importlib.resources.files("finescope").joinpath(RECIPE).read_text(encoding="utf-8")
    recipe = parse(text, RECIPE, overrides)
    closing_table(pipeline.run(recipe, reporter, check=check_resources))


def check_resources(recipe: Recipe) -> None:
    """`plan.check_resources`, which imports torch, and so only where something is left to do."""
    from finescope.plan import check_resources

    check_resources(recipe)
