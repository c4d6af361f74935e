"""Model cards: what a model directory says of itself on the Hugging Face hub and to the person who finds it in a year."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from finescope.models.load import ModelReference

_KINDS = {
    "pruned": "pruned for one domain by finescope; not trained since",
    "recovered": "pruned for one domain by finescope and trained on that domain's curated documents",
    "control": "pruned by finescope and trained on random documents: a control, not for use",
}


def model_card(base: ModelReference, source: str, kind: str, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The README.md of a model directory: front matter with base_model, `facts` as a table, and the recipe's sections by name.

    `source` is the base model as the recipe names it.
    """
    name = model_name(base, source)
    revision = f" at {base.revision}" if base.revision else ""
    front = {"base_model": name, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["finescope", kind]}
    rows = [(key, _shown(value)) for key, value in facts.items()]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}, {kind}",
        "",
        f"`{name}`{revision}, {_KINDS[kind]}. Loads with `AutoModelForCausalLM.from_pretrained` and no other code.",
        "",
        *markdown_table(("fact", "value"), rows),
        "",
        f"Fingerprint of the base weights: `{base.fingerprint[:16]}`.",
        "",
        "Made by this part of a recipe:",
        "",
        "```yaml",
        yaml.safe_dump(dict(settings), sort_keys=False).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]


def model_name(base: ModelReference, source: str) -> str:
    """The hub id, or the last name of a path: a card tells nothing of the machine that it was written on."""
    return base.path if base.revision else source.rstrip("/").rsplit("/", 1)[-1]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
