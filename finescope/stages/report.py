"""`report`: the self-contained HTML page of a run."""

from finescope import storage
from finescope.analysis.report import write_report
from finescope.config import Recipe
from finescope.steps import Outcome, StepInput


def report(recipe: Recipe, step: StepInput) -> Outcome:
    """Write `report/report.html`."""
    uri = storage.join(step.uri, "report.html")
    write_report(recipe.output, step.inputs, uri)
    return Outcome(facts={"report": uri})
