"""A small run to plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from tiny_models import saved_model
from tiny_run import recipe_values

from finescope import storage
from finescope.config import Recipe
from finescope.plan import Cost

DOCUMENTS, BYTES = 120, 200


def inputs_at(root: Path) -> Path:
    """A model of four tiny blocks, two files of 60 documents of 200 bytes, a seed."""
    saved_model(root / "model", "llama", tie_word_embeddings=True)
    for number in range(2):
        rows = [{"id": f"{number}-{at}", "text": f"{at:0{BYTES}d}"} for at in range(DOCUMENTS // 2)]
        storage.put_parquet(str(root / "corpus" / f"part-{number}.parquet"), pa.Table.from_pylist(rows))
    (root / "seeds.jsonl").write_text('{"text": "a seed"}\n')
    return root


def recipe_of(root: Path, output: Path, **changes: Any) -> Recipe:
    values = recipe_values(root, "plan", **changes)
    return Recipe.model_validate({**values, "output": str(output), "evaluate": {}})


def by_step(found: Sequence[Cost]) -> dict[str, Cost]:
    return {cost.step: cost for cost in found}
