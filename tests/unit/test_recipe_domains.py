"""Recipes of several domains."""

from pathlib import Path

import pytest
from test_recipe import BASE, identities

from finescope.config import STEPS
from finescope.errors import RecipeError
from finescope.pipeline import placed, steps_of
from finescope.recipe import parse

DOMAINS = BASE.replace("{path: seeds.jsonl}", "{math: a.jsonl, law: '{output}/b.jsonl'}")


def test_seeds_of_several_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse(DOMAINS + "evaluate: {target: {law: ['{output}/t.jsonl']}}", "r.yaml")
    assert [(seeds.domain, seeds.path, seeds.key) for seeds in recipe.seeds.files] == [
        ("math", "a.jsonl", "seeds.math"),
        ("law", "{output}/b.jsonl", "seeds.law"),
    ]
    found = placed(recipe)
    output = str(tmp_path / "runs" / "x")
    assert [seeds.path for seeds in found.seeds.files] == ["a.jsonl", f"{output}/b.jsonl"]
    assert (found.evaluate.target_of("law"), found.evaluate.target_of("math")) == ((f"{output}/t.jsonl",), ())
    assert list(steps_of(recipe)) == [*STEPS[:4], *(f"{step}-{domain}" for step in STEPS[4:] for domain in ("math", "law"))]
    assert parse(BASE, "r.yaml").seeds.files[0].key == "seeds.path"
    assert [seeds.domain for seeds in parse(BASE.replace("seeds: {path:", "seeds: {math:"), "r.yaml").seeds.files] == ["math"]


def test_another_domain_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "a"}\n')
    Path("seeds.jsonl").write_text('{"text": "a"}\n')
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/b.jsonl").write_text('{"text": "b"}\n')
    one, two = identities(parse(BASE, "r.yaml")), identities(parse(DOMAINS, "r.yaml"))
    three = identities(parse(DOMAINS, "r.yaml", ["seeds.med=c.jsonl", "evaluate.target={med: [t.jsonl]}"]))
    assert {name: three[name] for name in two} == two
    assert {step: two.get(f"{step}-math", two.get(step)) for step in STEPS} == one, "nor does a name"
    assert len({two["score-math"], two["score-law"], three["score-med"]}) == 3
    held_out = identities(parse(DOMAINS, "r.yaml", ["evaluate.target={law: [t.jsonl]}"]))
    assert [name for name in two if held_out[name] != two[name]] == ["evaluate-law", "report-law"]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ("{pth: s.jsonl}", "seeds.pth: unknown key; did you mean 'path'?"),
        ("{path: s.jsonl, law: l.jsonl}", "seeds.law: unknown key"),
        ("{Law-1: l.jsonl, math: m.jsonl}", "seeds.path.Law-1: string should match pattern"),
        ("{law: 3}", "seeds.path.law: "),
        ("{}", "seeds.path: missing"),
    ],
)
def test_seeds_that_are_wrong(seeds: str, said: str):
    with pytest.raises(RecipeError) as raised:
        parse(BASE.replace("{path: seeds.jsonl}", seeds), "r.yaml")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DOMAINS + "evaluate: {target: [t.jsonl]}", "evaluate.target: expected files by domain, as seeds has several: math, law"),
        (DOMAINS + "evaluate: {target: {lwa: [t.jsonl]}}", "evaluate.target: lwa is no domain of seeds; domains: math, law"),
        (BASE + "evaluate: {target: {law: [t.jsonl]}}", "domains: none, since seeds.path is of one domain"),
    ],
)
def test_targets_are_those_of_the_domains(text: str, said: str):
    with pytest.raises(RecipeError) as raised:
        parse(text, "r.yaml")
    assert said in str(raised.value)
