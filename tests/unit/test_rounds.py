import math
from pathlib import Path

import pytest
from tiny_run import recipe_values

from finescope.config import STEPS, DistillSection, PruneSection, Recipe
from finescope.manifest import domains_of, label_of, of_domain, step_and_domain
from finescope.pipeline import steps_of
from finescope.rounds import in_order, kind_of, round_of, rounds_of


def rounds(**pruning):
    return rounds_of(PruneSection(**pruning), DistillSection(control=True))


def recipe(tmp_path: Path, **prune) -> Recipe:
    for name in ("seeds", "target", "general"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    return Recipe.model_validate(recipe_values(tmp_path, "run", prune=prune))


def test_one_round_is_the_recipe_as_it_is():
    (only,) = rounds(ratio=0.35)
    assert only == ("prune", "distill", PruneSection(ratio=0.35), DistillSection(control=True), None)


def test_each_round_keeps_the_same_share_of_what_it_finds():
    # 0.488 of the parameters leave, so that four fifths stay three times.
    found = rounds(ratio=0.488, rounds=3)
    assert [(turn.prune, turn.distill, turn.before) for turn in found] == [
        ("prune-1", "distill-1", None),
        ("prune-2", "distill-2", "distill-1"),
        ("prune", "distill", "distill-2"),
    ]
    assert [1 - turn.pruning.ratio for turn in found] == pytest.approx([0.8, 0.64, 0.512])
    assert found[-1].pruning.ratio == 0.488
    assert [turn.training.control for turn in found] == [False, False, True]
    assert {turn.pruning.rounds for turn in found} == {1}


def test_names_of_steps_with_rounds_and_domains():
    labels = {
        ("prune-1", ""): "prune-1",
        ("prune-12", "law"): "prune-12-law",
        ("prune", "law"): "prune-law",
        ("prune", ""): "prune",
    }
    for (step, domain), label in labels.items():
        assert label_of(step, domain) == label
        assert step_and_domain(label) == (step, domain)
    assert domains_of(["index", "prune-1", "distill-1", "prune"]) == []
    assert domains_of(labels.values()) == ["law"]
    split = of_domain(dict.fromkeys(("index", "prune-1-law", "prune-law", "prune-1")), "law")  # type: ignore[arg-type]
    assert list(split) == ["index", "prune-1", "prune"]
    assert [(kind_of(step), round_of(step)) for step in ("prune-2", "prune")] == [("prune", 2), ("prune", None)]


def test_rounds_stand_between_curate_and_evaluate_in_turns():
    steps = {
        "report",
        "distill",
        "evaluate",
        "distill-10",
        "prune",
        "distill-2",
        "prune-10",
        "prune-2",
        "teach",
        "curate",
        "screen",
        "index",
    }
    turns = ["prune-2", "distill-2", "prune-10", "distill-10", "prune", "distill"]
    assert in_order(steps) == ["index", "screen", "curate", "teach", *turns, "evaluate", "report"]
    assert in_order(reversed(STEPS)) == list(STEPS)


def test_a_recipe_of_rounds_has_a_step_for_each(tmp_path: Path):
    once, twice = steps_of(recipe(tmp_path, ratio=0.19)), steps_of(recipe(tmp_path, ratio=0.19, rounds=2))
    assert list(once) == list(STEPS)
    assert list(twice) == [*STEPS[:7], "prune-1", "distill-1", *STEPS[7:]]
    built_on = {label: [step.name for step in twice[label].inputs] for label in twice}
    given = ["index", "model", "embed", "curate"]
    assert built_on["prune-1"] == given
    assert built_on["teach"] == given, "all rounds train on what was written once"
    assert built_on["distill-1"] == ["model", "teach", "prune-1"]
    assert built_on["prune"] == [*given, "distill-1"]
    assert built_on["distill"] == ["model", "teach", "prune"]
    assert built_on["evaluate"] == [*given, "prune", "distill"]
    assert built_on["report"][-6:] == ["teach", "prune-1", "distill-1", "prune", "distill", "evaluate"]
    assert math.isclose(twice["prune-1"].section["ratio"], 0.1)
    assert "rounds" not in once["prune"].section
    assert all(twice[step].identity == once[step].identity for step in STEPS[:7])
    assert all(twice[step].identity != once[step].identity for step in STEPS[7:])
    assert steps_of(recipe(tmp_path, ratio=0.19, rounds=1))["report"].identity == once["report"].identity


def test_every_domain_has_rounds_of_its_own(tmp_path: Path):
    plain = recipe(tmp_path, ratio=0.19, rounds=2)
    values = plain.model_dump() | {
        "seeds": {name: str(tmp_path / f"{name}.jsonl") for name in ("target", "general")},
        "evaluate": {},
    }
    labels = list(steps_of(Recipe.model_validate(values)))
    steps = ("prune-1", "distill-1", "prune", "distill")
    assert labels[10:18] == [f"{step}-{domain}" for step in steps for domain in ("target", "general")]
