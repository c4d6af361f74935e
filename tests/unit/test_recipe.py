from pathlib import Path
from typing import Any

import pytest

from finescope.config import ALL_STEPS, STEPS, Recipe
from finescope.errors import RecipeError
from finescope.pipeline import placed, steps_of
from finescope.recipe import load, parse

BASE = "output: runs/x\nmodel: {path: m}\ncorpus: {path: 'data/*.parquet'}\nseeds: {path: seeds.jsonl}\n"


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sections_that_are_not_given_have_their_defaults():
    recipe = parse(BASE, "r.yaml")
    assert recipe.sae.layer == 16
    assert recipe.corpus.path == ("data/*.parquet",), "one path is a list of one"
    assert set(STEPS) - {"index", "teach", "report"} <= set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("prume: {ratio: 0.1}", "r.yaml: prume: unknown key; did you mean 'prune'?"),
        ("prune: {ration: 0.1}", "r.yaml: prune.ration: unknown key; did you mean 'ratio'?"),
        ("sae: {coordinates: {methode: all}}", "r.yaml: sae.coordinates.methode: unknown key; did you mean 'method'?"),
        ("seeds_: 3", "r.yaml: seeds_: unknown key; did you mean 'seeds'?"),
        ("evaluate: {zzz: 1}", "evaluate.zzz: unknown key; known: tasks, target, general, documents"),
        ("str: 3", "r.yaml: str: unknown key"),
        ("sae: {'int': 3}", "r.yaml: sae.int: unknown key"),
        ("sae: {'k[0]': 3}", "r.yaml: sae.k[0]: unknown key; known: layer"),
        ("1: 3", "r.yaml: 1: keys should be strings"),
        ("on: 3", "keys should be strings, got True"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(more: str, expected: str):
    assert expected in refused(BASE + more)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("prune: {ratio: much}", ("prune.ratio: ", "valid number", "'much'")),
        ("sae: {k: [1]}", ("sae.k: ", "valid integer", "[1]")),
        ("sae: 3", ("sae: a mapping of keys was expected, got 3; known: layer, ",)),
        ("sae:", ("sae: a mapping of keys was expected, got None",)),
        ("score: {weighting: tfidf}", ("score.weighting: ", "'none', 'idf', 'centred', 'decoded' or 'contrast'", "'tfidf'")),
        ("compute: {actors: many}", ("compute.actors: ", "'auto'", "valid integer", "'many'")),
        ("prune: {structure: [head]}", ("prune.structure", "'heads', 'mlp', 'experts' or 'blocks'", "'head'")),
        ("evaluate: {tasks: [mmlu]}", ("evaluate.tasks.0: ", "'perplexity'", "'mmlu'")),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_given(more: str, expected: tuple[str, ...]):
    message = refused(BASE + more)
    assert all(part in message for part in expected), message
    assert "constrained" not in message


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ("prune: {ratio: 1.0}", "prune.ratio"),
        ("prune: {ratio: -0.1}", "prune.ratio"),
        ("prune: {structure: []}", "prune.structure"),
        ("prune: {seed: -1}", "prune.seed"),
        ("sae: {seed: 99999999999999999999}", "sae.seed"),
        ("sae: {layer: 0}", "sae.layer"),
        ("sae: {coordinates: {probes: 65}}", "sae.coordinates.probes"),
        ("sae: {coordinates: {count: 64}}", "sae.coordinates"),
        ("curate: {documents: 0}", "curate.documents"),
        ("curate: {threshold: .nan}", "curate.threshold"),
        ("curate: {diversity: 1.0}", "curate.diversity"),
        ("curate: {share: 0}", "curate.share"),
        ("curate: {tokens: 0}", "curate.tokens"),
        ("curate: {deduplicate: fuzzy}", "curate.deduplicate"),
        ("curate: {duplicate_jaccard: 0.1}", "curate.duplicate_jaccard"),
        ("curate: {documents: null}", "curate"),
        ("curate: {diversity: 0.5, tokens: 9}", "curate"),
        ("curate: {diversity: 0.5, documents: 50001}", "curate"),
        ("distill: {learning_rate: .inf}", "distill.learning_rate"),
        ("distill: {warmup_share: 1.5}", "distill.warmup_share"),
        ("compute: {actors: 0}", "compute.actors"),
        ("compute: {train_workers: 0}", "compute.train_workers"),
        ("compute: {gpus_per_actor: -0.5}", "compute.gpus_per_actor"),
        ("compute: {cpus_per_actor: 0}", "compute.cpus_per_actor"),
    ],
)
def test_out_of_range(more: str, path: str):
    assert f"r.yaml: {path}: " in refused(BASE + more)


def test_all_that_is_wrong_is_told_at_once():
    message = refused("model: {path: ''}\ncorpus: {path: []}\nsae: {layer: 0}")
    for part in ("output: missing", "seeds: missing", "model.path: ", "corpus.path: ", "sae.layer: "):
        assert part in message


def test_rules_over_several_keys():
    assert "corpus: prompt and response are given together" in refused(BASE.replace("path: 'data", "prompt: p, path: 'data"))
    assert "sae: k (65) is larger than num_latents (64)" in refused(BASE + "sae: {k: 65, num_latents: 64}")
    assert parse(BASE + "sae: {k: 64, num_latents: 64}", "r.yaml").sae.k == 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output: a\nmodel: {path: b}\noutput: c\n", "r.yaml: line 3, column 1 cannot be read: key 'output' stands twice"),
        ("sae:\n  k: 3\n  k: 4\n", "r.yaml: line 3, column 3 cannot be read: key 'k' stands twice"),
        ("output: [a\nmodel: 3\n", "r.yaml: line 2, column 6 cannot be read: "),
        ("output: a\n\tmodel: 3\n", "r.yaml: line 2, column 1 cannot be read: "),
        ("output: {{ target }}", "line 1, column 10 cannot be read: a key must be plain text; quote a value"),
        ("output: *gone", "r.yaml: line 1, column 9 cannot be read: found undefined alias 'gone'"),
        ("output: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("output: \x00", "r.yaml is not YAML: unacceptable character"),
        ("- output\n", "a mapping of sections was expected, not list"),
        ("", "a mapping of sections was expected, not NoneType"),
    ],
)
def test_bad_yaml_names_the_line(text: str, expected: str):
    assert expected in refused(text)


def test_anchors_and_merge_keys():
    text = BASE + "embed: &lengths {max_tokens: 64}\nprune:\n  <<: *lengths\n  ratio: 0.5\n"
    recipe = parse(text, "r.yaml")
    assert (recipe.prune.max_tokens, recipe.prune.ratio) == (64, 0.5)


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("prune.ratio=0.5", "prune.ratio", 0.5),
        ("sae.coordinates={method: pca, count: 7}", "sae.coordinates.count", 7),
        ("output=memory://a=b", "output", "memory://a=b"),
        ("evaluate.target=[a.jsonl, b.jsonl]", "evaluate.target", ("a.jsonl", "b.jsonl")),
        ("corpus.path=one.parquet", "corpus.path", ("one.parquet",)),
        ("corpus.text='{a} {b}'", "corpus.text", "{a} {b}"),
        ("curate.per_seed=null", "curate.per_seed", None),
        ("distill.learning_rate=1e-4", "distill.learning_rate", 1e-4),
        ("distill.rewrite=false", "distill.rewrite", False),
    ],
)
def test_an_override(override: str, path: str, expected: Any):
    found: Any = parse(BASE + "sae: {k: 3}", "r.yaml", [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected


def test_overrides_are_laid_over_what_is_there_and_the_last_one_counts():
    recipe = parse(BASE + "sae: {k: 3, layer: 4}\nprune:\n", "r.yaml", ["sae.k=5", "sae.k=6", "prune.ratio=0.5"])
    assert (recipe.sae.k, recipe.sae.layer, recipe.prune.ratio) == (6, 4, 0.5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("prune.ratio", "--set prune.ratio: expected section.field=value"),
        ("=3", "expected section.field=value"),
        ("prune..ratio=3", "expected section.field=value"),
        ("output.deep=3", "--set output.deep=3: 'output' is not a section"),
        ("prune.ration=3", "prune.ration: unknown key; did you mean 'ratio'?"),
        ("prune.ratio=3", "prune.ratio: "),
        ("corpus.path=[a", "--set corpus.path: line 1"),
    ],
)
def test_a_bad_override(override: str, expected: str):
    assert expected in refused(BASE, override)


def test_a_file(tmp_path: Path):
    path = tmp_path / "r.yaml"
    with pytest.raises(RecipeError, match=r"no recipe at '.*r\.yaml'; `finescope init` writes one"):
        load(str(path))
    for other in (tmp_path, path / "below"):
        path.write_text(BASE)
        with pytest.raises(RecipeError, match="no recipe at"):
            load(str(other))
    assert load(str(path), ["prune.ratio=0.5"]).prune.ratio == 0.5
    path.write_bytes(BASE.encode() + b"# \xff")
    with pytest.raises(RecipeError, match=rf"r\.yaml: not UTF-8 text \(byte {len(BASE) + 2}\)"):
        load(str(path))


def test_paths_in_the_output_follow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = BASE.replace("'data/*", "'{output}/inputs/*").replace("seeds.jsonl", "'{output}/seeds.jsonl'")
    recipe = parse(text + "evaluate: {target: ['{output}/t.jsonl', other.jsonl]}", "r.yaml")
    found = placed(recipe)
    output = str(tmp_path / "runs" / "x")
    assert found.output == output
    assert found.corpus.path == (f"{output}/inputs/*.parquet",)
    assert found.seeds.path == f"{output}/seeds.jsonl"
    assert found.evaluate.target == (f"{output}/t.jsonl", "other.jsonl")
    assert found.curate == recipe.curate


def identities(recipe: Recipe) -> dict[str, str]:
    return {name: step.identity for name, step in steps_of(recipe).items()}


def test_what_moves_a_step_and_what_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("seeds.jsonl").write_text('{"text": "a"}\n')
    first = identities(parse(BASE, "r.yaml"))

    def changed(*overrides: str) -> list[str]:
        found = identities(parse(BASE, "r.yaml", overrides))
        return [name for name in STEPS if found[name] != first[name]]

    assert list(first) == list(STEPS)
    assert changed("compute={runner: local, actors: 3, train_workers: 2}", "output=elsewhere") == []
    assert changed("corpus.max_reject_rate=0.5") == [], "who puts up with more rejects goes on with what is done"
    assert changed("evaluate.documents=5") == ["evaluate", "report"]
    assert changed("curate.documents=5") == list(STEPS[STEPS.index("curate") :])
    assert changed("score.similarity=max") == list(STEPS[STEPS.index("score") :])
    assert changed("sae.k=5") == list(STEPS[STEPS.index("sae") :])
    assert changed("sae.layer=5")[0] == "model"
    assert changed("corpus.limit=5") == [name for name in STEPS if name != "model"]
    Path("seeds.jsonl").write_text('{"text": "b"}\n')
    assert changed() == list(STEPS[STEPS.index("score") :]), "new seeds leave the embeddings as they are"


def test_behind_a_screen_the_embeddings_depend_on_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("seeds.jsonl").write_text('{"text": "a"}\n')
    Path("b.jsonl").write_text('{"text": "b"}\n')
    plain, first = identities(parse(BASE, "r.yaml")), identities(parse(BASE, "r.yaml", ["screen={}"]))
    assert list(first) == list(ALL_STEPS)
    assert [name for name in STEPS if plain[name] != first[name]] == list(STEPS[STEPS.index("embed") :])

    def changed(*overrides: str) -> list[str]:
        found = identities(parse(BASE, "r.yaml", ["screen={}", *overrides]))
        return [name for name in ALL_STEPS if found[name] != first[name]]

    after = list(ALL_STEPS[ALL_STEPS.index("screen") :])
    assert changed("screen.share=0.1") == changed("score.similarity=max") == changed("embed.max_tokens=64") == after
    assert changed("curate.documents=5") == list(STEPS[STEPS.index("curate") :])
    named, other = (
        identities(parse(BASE.replace("{path: seeds.jsonl}", seeds), "r.yaml", ["screen={}"]))
        for seeds in ("{x: seeds.jsonl, y: b.jsonl}", "{a: b.jsonl, b: seeds.jsonl}")
    )
    assert named["embed"] == other["embed"] != first["embed"], "neither names nor their order count, domains do"
    Path("seeds.jsonl").write_text('{"text": "c"}\n')
    assert changed() == after
