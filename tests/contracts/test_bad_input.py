"""The contract's table of bad input: recipe, corpus and seeds. Exit code, message, and what is left on disk."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_inputs import Case, refused
from cli_runs import stamps, states
from tiny_run import rows, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_inputs(tmp_path_factory.mktemp("inputs"), documents=80)
    # To this tokenizer a tilde is nothing: a text of tildes has characters and no token.
    tokenizer = root / "model" / "tokenizer.json"
    normalizer = {"type": "Replace", "pattern": {"String": "~"}, "content": ""}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"normalizer": normalizer}))
    return root


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("embed", "poling", "max", ("embed.poling: unknown key", "did you mean 'pooling'")),
        ("sae", "k", "many", ("sae.k: ", "valid integer", "'many'")),
        ("prune", "ratio", 1.5, ("prune.ratio: ", "less than 1", "1.5")),
        ("prune", "rounds", 0, ("prune.rounds: ", "greater than or equal to 1", "0")),
        ("prune", "rounds", "two", ("prune.rounds: ", "valid integer", "'two'")),
        ("prune", "structure", ["block"], ("prune.structure", "'heads', 'mlp', 'experts' or 'blocks'", "'block'")),
        ("score", "weighting", "tfidf", ("score.weighting: ", "'none', 'idf', 'centred', 'decoded' or 'contrast'", "'tfidf'")),
    ],
)
def test_a_recipe_that_is_wrong(
    inputs: Path, tmp_path: Path, command: str, section: str, key: str, value: Any, said: tuple[str, ...]
) -> None:
    case = Case(inputs, tmp_path)
    case.values.setdefault(section, {})[key] = value
    refused(case.run(command=command), "recipe.yaml: ", *said)
    assert not case.output.exists()


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "INPUTS/nothing-*.parquet"}, ("corpus.path: no file matches 'INPUTS/nothing-*.parquet'",)),
        ({"text": "body"}, ("part-0.parquet' has no column 'body'; it has: id, text, source",)),
        ({"text": "{text} {answer}"}, ("has no column 'answer'; it has: id, text, source",)),
        ({"text": "{text"}, ("corpus.text: bad template '{text', position 0",)),
        ({"prompt": "{id.x}", "response": "text"}, ("corpus.prompt: bad template '{id.x}', position 3",)),
    ],
)
def test_a_corpus_that_is_not_as_the_recipe_says(
    inputs: Path, tmp_path: Path, command: str, changes: dict[str, str], said: tuple[str, ...]
) -> None:
    put = {key: value.replace("INPUTS", str(inputs)) for key, value in changes.items()}
    case = Case(inputs, tmp_path, corpus=put)
    refused(case.run(command=command), *(part.replace("INPUTS", str(inputs)) for part in said))
    assert not case.output.exists()


def test_a_missing_column_of_ids(inputs: Path, tmp_path: Path) -> None:
    case = Case(inputs, tmp_path, corpus={"id": "key"})
    refused(case.run(), "has no column 'key'; it has: id, text, source")
    assert states(case.output) == {"index": "failed"}
    assert not (case.output / "index" / "manifest.json").exists()


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """A corpus of 100 good lines and six that are not documents, and of a Parquet file that was cut short."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps(row).encode() for row in rows(100)]
    lines[10:10] = [b'{"id": "null", "text": null}', b'{"id": "empty", "text": "  "}', b'{"id": "bytes", "text": "\xff"}']
    lines[50:50] = [b'{"id": "cut", "te', json.dumps({"id": "long", "text": "salt " * 500}).encode()]
    lines.append(json.dumps({"id": "one", "text": "salt"}).encode())
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    pq.write_table(pa.Table.from_pylist(rows(50, seed=1)), folder / "whole.parquet")
    whole = (folder / "whole.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    return folder


_DIRTY = {"null_text": 1, "empty_text": 1, "not_utf8": 1, "bad_json": 1, "too_long": 1, "too_short": 1}


def test_bad_rows_and_files_are_rejected_with_a_reason_and_the_rest_goes_on(inputs: Path, tmp_path: Path, dirty: Path) -> None:
    corpus = {"path": str(dirty / "*"), "max_characters": 2000, "max_reject_rate": 0.05}
    case = Case(inputs, tmp_path, corpus=corpus)
    ended = case.run("--until", "embed")
    assert ended.code == 0, ended.err
    manifest = json.loads((case.output / "embed" / "manifest.json").read_text())
    assert (manifest["rows_in"], manifest["rows_out"], manifest["rejects"]) == (156, 150, 6)
    rejected = [row for path in (case.output / "embed" / "rejects").iterdir() for row in pq.read_table(path).to_pylist()]
    assert Counter(row["reason"] for row in rejected) == _DIRTY
    assert {row["file"] for row in rejected} == {str(dirty / "lines.jsonl")}
    assert {row["reason"]: row["row"] for row in rejected} == {
        "null_text": 10,
        "empty_text": 11,
        "not_utf8": 12,
        "bad_json": 50,
        "too_long": 51,
        "too_short": 105,
    }
    (whole,) = (row for path in (case.output / "index" / "rejects").iterdir() for row in pq.read_table(path).to_pylist())
    assert (whole["file"], whole["reason"], whole["row"]) == (str(dirty / "cut.parquet"), "unreadable_file", None)
    assert whole["detail"]


def test_too_many_rejects_fail_and_a_higher_rate_goes_on(inputs: Path, tmp_path: Path, dirty: Path) -> None:
    with open(dirty / "lines.jsonl", "ab") as file:
        file.write(b'{"id": "again", "text": null}\n')
    case = Case(inputs, tmp_path, corpus={"path": str(dirty / "*"), "max_characters": 2000})
    failed = case.run("--until", "embed")
    refused(
        failed, "step 'embed' failed: 7 of 157 rows are rejected", "corpus.max_reject_rate (0.01)", "2 of them: null_text", code=1
    )
    (log,) = (line.removeprefix("finescope: log: ") for line in failed.errors[1:])
    assert "StepFailed" in Path(log).read_text()
    assert states(case.output)["embed"] == "failed"
    assert not (case.output / "embed" / "manifest.json").exists()
    before = stamps(case.output / "embed")
    assert len([name for name in before if name.startswith("units/")]) == 2
    again = case.run("--until", "embed", "--set", "corpus.max_reject_rate=0.1")
    assert again.code == 0, again.err
    after = stamps(case.output / "embed")
    assert {name for name in after if after[name] != before.get(name)} == {"manifest.json"}


def test_a_corpus_of_which_no_file_can_be_read(inputs: Path, tmp_path: Path, dirty: Path) -> None:
    case = Case(inputs, tmp_path, corpus={"path": str(dirty / "cut.parquet")})
    refused(case.run(), "step 'index' failed: no file of the corpus can be read", "cut.parquet: unreadable_file", code=1)
    assert states(case.output) == {"index": "failed"}


def test_duplicate_ids(inputs: Path, tmp_path: Path) -> None:
    lines = [*rows(40), *rows(5)]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    case = Case(inputs, tmp_path, corpus={"path": str(tmp_path / "twice.jsonl")})
    said = "column 'id' is not unique: 5 ids stand more than once, such as 'd0-0000' (2 times), 'd0-0001' (2 times), 'd0-0002'"
    refused(case.run(), f"corpus.id: {said}")
    assert states(case.output) == {"index": "failed"}
    assert {path.name for path in case.output.iterdir()} == {"run.json", "index"}, "no model, no log"
    assert list(stamps(case.output / "index")) == ["step.json"]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (None, ("seeds.path: no file matches", "seeds.jsonl")),
        ("", ("seeds.path: '", "seeds.jsonl' holds no seed")),
        ("\n\n", ("seeds.path: '", "seeds.jsonl' holds no seed")),
        ('{"text": "the sum of"}\n{"text": " "}\n', ("seeds.jsonl', line 2: its text is empty",)),
        ('{"text": "the sum of"}\n{"text": "~~"}\n', ("seeds.jsonl', line 2: its text is empty",)),
        ('{"text": "sum ~~"}\n', ("seeds.path: ", "seeds.jsonl: seed 1 has 1 token; at least 2 were expected")),
        ('{"text": "the sum of"}\n{"text": \n', ("seeds.jsonl', line 2: not a JSON object",)),
        ('{"title": "the sum of"}\n', ("seeds.jsonl', line 1: expected text", "got title")),
    ],
)
def test_seeds_that_are_none(inputs: Path, tmp_path: Path, seeds: str | None, said: tuple[str, ...]) -> None:
    path = tmp_path / "seeds.jsonl"
    if seeds is not None:
        path.write_text(seeds)
    case = Case(inputs, tmp_path, seeds={"path": str(path)})
    refused(case.run(), *said)
    # Found as soon as there is a tokenizer, before anything that takes long.
    assert states(case.output) == {"index": "done", "model": "done"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate": {"target": ["HOME/none.jsonl"]}}, ("evaluate: no file matches 'HOME/none.jsonl'",)),
        ({"evaluate": {"general": ["HOME/bad.jsonl"]}}, ("bad.jsonl', row 0: bad_json",)),
        ({"curate": {"decontaminate": ["HOME/none.jsonl"]}}, ("curate.decontaminate: no file matches 'HOME/none.jsonl'",)),
    ],
)
def test_held_out_sets_are_looked_at_before_the_dear_steps(
    inputs: Path, tmp_path: Path, changes: dict[str, dict[str, list[str]]], said: tuple[str, ...]
) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    put = json.loads(json.dumps(changes).replace("HOME", str(tmp_path)))
    case = Case(inputs, tmp_path, **put)
    refused(case.run(), *(part.replace("HOME", str(tmp_path)) for part in said))
    assert states(case.output) == {"index": "done", "model": "done"}
