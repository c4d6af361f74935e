"""The card of a curated set: README.md beside its table, with which `datasets.load_dataset` opens the step's directory."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from finescope.config import CurateSection
from finescope.manifest import TableFile
from finescope.stages.cards import markdown_table, model_name
from finescope.stages.references import model_of
from finescope.steps import StepInput

# The hub's classes of size, by the first number of rows that is too many for one.
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def dataset_card(step: StepInput, section: CurateSection, files: Sequence[TableFile], facts: Mapping[str, Any]) -> str:
    """How the set was made, in words and figures. It holds no text of the corpus and no path of the machine."""
    rows = sum(file.rows for file in files)
    model = model_name(model_of(step["model"]), step["model"].facts["source"])
    front = {
        # The corpus's licence is nothing that finescope can know.
        "license": "unknown",
        "size_categories": [next((name for most, name in _SIZES if rows < most), "10M<n<100M")],
        "tags": ["finescope", "curated"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "curated/*.parquet"}]}],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        "# Curated documents",
        "",
        f"{rows:,} of {facts['scored']:,} documents, chosen by finescope for their likeness to the seeds of a domain. `rank` 1 "
        "is the first choice, `score` the likeness, `seed` the number of the nearest seed, `text` what was scored; the columns "
        "between are those of the source. The licence is that of the corpus.",
        "",
        *markdown_table(("", ""), [(name, _shown(value)) for name, value in _rows(step, section, rows, model, facts)]),
        "",
    ]
    return "\n".join(lines)


def _rows(step: StepInput, section: CurateSection, rows: int, model: str, facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    sae, score = step["sae"], step["score"]
    dictionary = {key: sae.facts[key] for key in ("layer", "architecture", "num_latents", "k", "fvu") if key in sae.facts}
    settings = section.model_dump(mode="json") | {"decontaminate": [path.rsplit("/", 1)[-1] for path in section.decontaminate]}
    reasons = [(f"rejected: {reason}", count) for reason, count in facts["reasons"].items()]
    screen = []
    if "screen" in step.inputs:
        passed, documents = step["screen"].facts["passed"], step["screen"].rows_out
        screen = [("screen", f"let through {passed:,} of {documents:,} documents")]
    return [
        ("base model", model),
        ("dictionary", dictionary | {"identity": sae.identity}),
        ("pooling", {key: value for key, value in step["embed"].section.items() if isinstance(value, int | str)}),
        *screen,
        ("seeds", len(score.facts["seeds"])),
        ("score settings", {key: value for key, value in score.section.items() if isinstance(value, int | float | str)}),
        ("selection settings", settings),
        ("documents kept", rows),
        ("their tokens", facts["tokens"]),
        *reasons,
        ("score range", f"{facts['lowest_score']:.4f} to {facts['highest_score']:.4f}"),
        ("identity of this step", step.identity),
    ]


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"`{json.dumps(value)}`"
