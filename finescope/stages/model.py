"""`model`: which weights exactly this run is about, in a form that every later step loads quickly and in part."""

from typing import Any

from finescope import storage
from finescope.config import ModelSection
from finescope.errors import ModelError
from finescope.models.load import materialise
from finescope.models.source import resolve
from finescope.runners.base import Context
from finescope.steps import Outcome, StepInput


def model(context: Context, section: ModelSection, layer: int, step: StepInput) -> Outcome:
    """Resolve the model, pin it, check its anatomy; a GGUF file is dequantised once to `model/base`.

    Raises:
        ModelError: not found, refused, of an unknown architecture, or with fewer blocks than `sae.layer`.
    """
    source = resolve(section, "model.path")
    with context.reporter.task(f"model: {section.path.rsplit('/', 1)[-1]}", 1, "models") as progress:
        reference = materialise(source, section, storage.join(step.uri, "base"))
        progress(1)
    if layer > reference.num_layers:
        raise ModelError(f"sae.layer: {layer} is beyond the {reference.num_layers} blocks of '{section.path}'")
    facts: dict[str, Any] = {"reference": reference.model_dump(mode="json"), "source": section.path}
    return Outcome(facts=facts)
