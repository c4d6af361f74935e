"""A run whose corpus, seeds and output are on S3: killed once, and then the same as on a local disk."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import polars as pl
import pytest
import torch
from cli_runs import Ended, ended, finescope, start, write_recipe
from s3_server import make_bucket, serving, variables
from tiny_run import recipe_values, write_inputs

from finescope import storage
from finescope.analysis import frames
from finescope.config import STEPS
from finescope.manifest import read_run

_UNTIL = "curate"
_STEPS = STEPS[: STEPS.index(_UNTIL) + 1]
_UNITS = 12
_SMALL = {"sae": {"num_tokens": 800, "epochs": 1, "recovery_documents": 2}, "curate": {"documents": 40, "per_seed": 5}}


class Story(NamedTuple):
    """A run on S3 that was killed in embed and then ended, and the same on a local disk."""

    output: str
    local: str
    killed_at: dict[str, str]  # the states of the steps
    done_then: list[str]  # the units that were embedded
    last: Ended
    temporary: Path  # of the processes


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    home = tmp_path_factory.mktemp("s3")
    root = write_inputs(home / "inputs", documents=120, rows_per_group=10)
    temporary = home / "temporary"
    temporary.mkdir()
    local, threads = home / "local", torch.get_num_threads()
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        environment = variables(server, home)
        for name, value in {**environment, "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        bucket = make_bucket(server, "runs")
        torch.set_num_threads(1)  # as in the processes that it is compared with
        values = recipe_values(root, "local", **_SMALL) | {"output": str(local)}
        assert finescope("run", write_recipe(home / "local.yaml", values), "--until", _UNTIL).code == 0
        torch.set_num_threads(threads)
        output, recipe = f"{bucket}/deep/run", _moved(root, bucket, home)
        process = start(["run", recipe, "--until", _UNTIL], TMPDIR=str(temporary))
        units = f"{output}/embed/units"
        while len(storage.list_names(units)) < 2:
            assert process.poll() is None, ended(process).err
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert ended(process).code == -signal.SIGKILL
        killed = {label: state.state for label, state in read_run(output).steps.items()}
        done = storage.list_names(units)
        last = ended(start(["run", recipe, "--until", _UNTIL], TMPDIR=str(temporary)))
        yield Story(output, str(local), killed, done, last, temporary)
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def _moved(root: Path, bucket: str, home: Path) -> str:
    """The recipe with corpus and seeds in the bucket; its path."""
    for path in (*(root / "corpus").iterdir(), root / "seeds.jsonl"):
        storage.put_bytes(f"{bucket}/{path.relative_to(root)}", path.read_bytes())
    values = recipe_values(root, "s3", **_SMALL) | {"output": f"{bucket}/deep/run"}
    values["corpus"]["path"], values["seeds"]["path"] = [f"{bucket}/corpus/*.parquet"], f"{bucket}/seeds.jsonl"
    return write_recipe(home / "s3.yaml", values)


def test_it_was_killed_in_embed_and_went_on(story: Story) -> None:
    assert story.killed_at == {**dict.fromkeys(_STEPS[:3], "done"), "embed": "running"}
    assert 2 <= len(story.done_then) < _UNITS
    assert story.last.code == 0, story.last.err


@pytest.mark.parametrize("table", ["embeddings", "scores", "curated", "rejects", "latents"])
def test_tables_are_those_of_a_run_on_a_local_disk(story: Story, table: str) -> None:
    found, expected = (frames.table(output, table).collect() for output in (story.output, story.local))
    assert found.height > 0
    # Of rejects the file is named in full.
    there = pl.exclude("file") if table == "rejects" else pl.all()
    assert found.select(there).equals(expected.select(there))


def test_a_query_over_s3_reads_what_it_needs(story: Story) -> None:
    best = frames.table(story.output, "scores").filter(pl.col("score") > 0).select("doc_id", "score").sort("score").tail(5)
    expected = frames.table(story.local, "scores").filter(pl.col("score") > 0).select("doc_id", "score").sort("score").tail(5)
    assert best.collect().equals(expected.collect())
    assert frames.table(story.output, "documents").select(pl.len()).collect().item() == _UNITS


def test_nothing_is_left_over(story: Story) -> None:
    found, expected = (_names(output) for output in (story.output, story.local))
    assert found == expected
    assert not [path.name for path in story.temporary.iterdir() if path.name.startswith(storage.TEMPORARY_PREFIX)]


def _names(output: str) -> list[str]:
    """All files below, hidden ones too."""
    fs, path = storage.filesystem(output)
    return sorted(str(name).removeprefix(f"{path}/") for name in fs.find(path))


@pytest.mark.parametrize("arguments", ["status", "inspect", "inspect scores", "inspect curated"])
def test_the_command_line_reads_it(story: Story, arguments: str) -> None:
    verb, *table = arguments.split()
    found, expected = (finescope(verb, output, *table, "--json") for output in (story.output, story.local))
    assert found.code == expected.code == 0, found.err
    assert json.loads(found.out).keys() == json.loads(expected.out).keys()
    if verb == "status":
        steps = json.loads(found.out)["steps"]
        assert {step: steps[step]["state"] for step in _STEPS} == dict.fromkeys(_STEPS, "done")
