import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from finescope.config import Recipe
from finescope.errors import UserError
from finescope.recipe import load, parse
from finescope.scaffold import example_recipe, write_example


def keys(model: type[BaseModel]) -> dict[str, Any]:
    """The keys of a section and of the sections in it."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        found[name] = keys(field.annotation) if inner and field.annotation else None
    return found


def shape(values: dict[str, Any]) -> dict[str, Any]:
    return {name: shape(value) if isinstance(value, dict) else None for name, value in values.items()}


def test_the_example_shows_every_key_in_order():
    found = shape(yaml.safe_load(example_recipe()))
    assert found == keys(Recipe)
    assert list(found) == list(Recipe.model_fields)


def test_the_example_is_the_defaults():
    recipe = parse(example_recipe(), "example")
    required = {"output": recipe.output, "model": {"path": recipe.model.path}, "corpus": {"path": recipe.corpus.path}}
    assert recipe == Recipe.model_validate({**required, "seeds": {"path": recipe.seeds.path}})


def test_every_section_and_every_choice_is_explained():
    lines = example_recipe().splitlines()
    weighting = next(line for line in lines if line.strip().startswith("weighting:"))
    assert weighting.endswith("# none | idf | centred | decoded | contrast; what is compared; none is the paper's")
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert lines[lines.index(f"{name}:") - 1].startswith("# ")


def test_what_init_writes_can_be_read(tmp_path: Path):
    recipe, seeds = write_example(tmp_path / "deep" / "new")
    assert load(str(recipe)).seeds.path == seeds.name
    texts = [json.loads(line)["text"] for line in seeds.read_text().splitlines()]
    assert len(texts) == len(set(texts)) == 3


@pytest.mark.parametrize("name", ["recipe.yaml", "seeds.jsonl"])
def test_nothing_is_overwritten(tmp_path: Path, name: str):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name}' is there already"):
        write_example(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_file_is_not_a_directory(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; expected a directory"):
        write_example(tmp_path / "file")
