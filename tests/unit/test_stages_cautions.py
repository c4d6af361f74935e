import json
from pathlib import Path

import pytest
from tiny_run import recipe_values

from finescope.config import PruneSection, Recipe
from finescope.errors import CorpusError
from finescope.stages.cautions import cautions, cautions_of, formal_share

FORMAL = (
    "He has 3 + 4 = 7 apples.",
    "Each of 5 boxes holds 12: 5*12 in all.",
    "Solve 2x + 1 for x.",
    "Find the roots of x^2 - 5.",
    r"Evaluate \frac{1}{2}.",
    "Let $a_n$ be a sequence.",
    "Use this:\n```\nls -l\n```",
    "def area(r):\n    return 3 * r",
    "import os",
    "#include <stdio.h>",
    "for (int i = 0; i < n; i++) { total(); }",
)
PLAIN = (
    "The parties agree, on 12/05/2020, that the rent is $1,200; the term is 2020-2021.",
    "1. The court shall:\n(a) hear the case;\n(b) decide it;\nand return the goods to their owner.",
    "Patients took 5 mg daily (n = 40, p = 0.05), and 12 - 14 % of them felt better.",
    "It costs $5 and $7. Import duties apply. From 3 to 4 for a while.",
    "What is the capital of France?",
)


@pytest.mark.parametrize("text", FORMAL)
def test_signs_of_mathematics_and_code(text: str):
    assert formal_share([text]) == 1


@pytest.mark.parametrize("text", PLAIN)
def test_law_medicine_and_prices_have_none(text: str):
    assert formal_share([text]) == 0


def test_the_share_of_texts():
    assert formal_share([FORMAL[0], *PLAIN[:3]]) == 0.25
    assert formal_share([]) == 0


def said(texts: dict[str, list[str]] | None = None, **section) -> list[str]:
    return cautions(PruneSection(**section), texts or {})


def test_more_than_half_at_once():
    (found,) = said(ratio=0.6)
    assert "prune.ratio 0.6" in found
    assert "prune.rounds" in found
    assert said(ratio=0.5) == said(ratio=0.6, rounds=2) == []


def test_many_whole_blocks_alone():
    (found,) = said(ratio=0.45, structure=("blocks",))
    assert "[blocks, mlp]" in found
    assert said(ratio=0.4, structure=("blocks",)) == said(ratio=0.45, structure=("blocks", "mlp")) == []


def test_whole_blocks_of_a_model_for_mathematics_or_code():
    texts = {"seeds.path": [FORMAL[0], *PLAIN[:3]], "evaluate.target": [FORMAL[0], *PLAIN[:4]]}
    (found,) = said(texts, structure=("blocks", "mlp"))
    assert "25% of seeds.path look like mathematics or code" in found
    assert said(texts, structure=("mlp",)) == said(texts) == []


def test_seeds_and_held_out_files_are_read_whatever_their_columns(tmp_path: Path):
    def write(name: str, texts: tuple[str, ...]) -> str:
        rows = [{"question": text, "turns": [{"content": "Yes."}], "number": 3} for text in texts]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def found(seeds: tuple[str, ...], target: tuple[str, ...], structure: str = "blocks") -> list[str]:
        values = recipe_values(tmp_path, "run", prune={"structure": [structure]})
        values["seeds"], values["evaluate"] = {"path": write("seeds.jsonl", seeds)}, {"target": [write("t.jsonl", target)]}
        recipe = Recipe.model_validate(values)
        return cautions_of(recipe, recipe.seeds.files[0])

    assert found(PLAIN, PLAIN) == []
    assert [text for text in found(FORMAL, PLAIN) if "100% of seeds.path" in text]
    assert [text for text in found(PLAIN, FORMAL) if "100% of evaluate.target" in text]
    assert found(FORMAL, FORMAL, "mlp") == []


def test_seeds_that_are_not_there(tmp_path: Path):
    recipe = Recipe.model_validate(recipe_values(tmp_path, "run", prune={"structure": ["blocks"]}))
    with pytest.raises(CorpusError, match=r"seeds\.path"):
        cautions_of(recipe, recipe.seeds.files[0])
