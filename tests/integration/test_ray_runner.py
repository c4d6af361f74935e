"""The same run on Ray: two actors, two processes that train, the results of the local runner."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
import ray
import torch
from cli_runs import Finished, SilentReporter, finescope, leftovers, write_recipe
from ray import cloudpickle
from safetensors.torch import load_file
from tiny_run import recipe_values, write_inputs

from finescope import pipeline
from finescope.config import Recipe
from finescope.manifest import Manifest
from finescope.runners.ray_data import map_units

# Many processes start, each of which imports torch: minutes where the machine is busy.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

_COMPUTE = {"runner": "ray", "actors": 2, "train_workers": 2, "memory_per_actor_gb": 0.1}


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    # Ray's sockets live below it and their paths may have 107 characters at most.
    with (
        tempfile.TemporaryDirectory(prefix="rr", dir="/tmp", ignore_cleanup_errors=True) as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        # Ray's workers stand back behind every other process; on a machine that is shared they would starve.
        patch.setenv("RAY_worker_niceness", "0")
        environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=directory,
            runtime_env={"env_vars": environment},
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def on_ray(finished: Finished, session: None) -> dict[str, Manifest]:
    # One student is enough to compare; what the control trains on moves no result of the other.
    values = recipe_values(finished.root, "ray", compute=_COMPUTE, distill={"control": False})
    return pipeline.run(Recipe.model_validate(values), SilentReporter())


def test_the_dictionary_is_the_same(finished: Finished, on_ray: dict[str, Manifest]) -> None:
    here, there = (
        load_file(Path(run["sae"].uri) / "dictionary" / "dictionary.safetensors") for run in (finished.manifests, on_ray)
    )
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(
    ("step", "table"), [("embed", "embeddings"), ("score", "scores"), ("curate", "curated"), ("teach", "rewrites")]
)
def test_tables_are_the_same_bit_for_bit(finished: Finished, on_ray: dict[str, Manifest], step: str, table: str) -> None:
    here, there = (pl.read_parquet(run[step].files(table)) for run in (finished.manifests, on_ray))
    assert here.height > 0
    assert here.equals(there)


def test_counts_are_the_same(finished: Finished, on_ray: dict[str, Manifest]) -> None:
    for name in ("index", "embed", "score", "curate", "teach", "prune", "distill"):
        here, there = finished.manifests[name], on_ray[name]
        assert (here.rows_in, here.rows_out, here.rejects) == (there.rows_in, there.rows_out, there.rejects), name
        assert there.rows_in == there.rows_out + there.rejects
    assert leftovers(Path(on_ray["report"].uri).parent) == []


def test_a_screen_lets_through_the_same(finished: Finished, session: None) -> None:
    def run(name: str, compute: dict[str, object]) -> dict[str, Manifest]:
        values = recipe_values(finished.root, name, compute=compute)
        screen = {"sample": 100, "audit": 60, "top": 0.2, "recall": 0.9}
        for step in ("index", "model", "sae"):
            shutil.copytree(finished.output / step, Path(values["output"]) / step)
        return pipeline.run(Recipe.model_validate({**values, "screen": screen}), SilentReporter(), "screen")

    here, there = run("screen-local", {"runner": "local"}), run("screen-ray", _COMPUTE)
    for table in ("screened", "sampled", "audited"):
        one, other = (pl.read_parquet(found["screen"].files(table)) for found in (here, there))
        assert one.height > 0
        assert one.equals(other), table
    assert 0 < here["screen"].facts["passed"] < here["screen"].rows_out
    assert here["screen"].facts == there["screen"].facts


def test_two_processes_train_the_student_of_one(finished: Finished, on_ray: dict[str, Manifest]) -> None:
    here, there, before = (
        load_file(Path(uri) / "model" / "model.safetensors")
        for uri in (finished.manifests["distill"].uri, on_ray["distill"].uri, finished.manifests["prune"].uri)
    )
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(there[name], here[name], atol=1e-4, rtol=0.0)
    # What is compared is a training: it moved the weights much further than that.
    assert max(float((here[name] - before[name]).abs().max()) for name in here) > 1e-3


def test_the_measures_are_the_same(finished: Finished, on_ray: dict[str, Manifest]) -> None:
    here, there = finished.manifests["evaluate"].facts["models"], on_ray["evaluate"].facts["models"]
    for name in ("base", "pruned", "recovered"):
        assert here[name]["tokens"] == there[name]["tokens"]
        assert there[name]["perplexity"] == pytest.approx(here[name]["perplexity"], rel=1e-3)


class Slow:
    """Says how many calls of it were running."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._running = seconds, 0

    def __call__(self, batch: pa.Table) -> pa.Table:
        self._running += 1
        time.sleep(self._seconds)
        running, self._running = self._running, self._running - 1
        return pa.table({"unit": batch.column("unit"), "running": [running]})


@pytest.mark.parametrize("units_at_once", [1, 2])
def test_an_actor_has_as_many_units_at_a_time_as_it_may(session: None, units_at_once: int) -> None:
    # A worker's class travels by name, which no module of the cluster has.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    units, options = pa.table({"unit": range(4)}), {"num_cpus": 1}
    found = [
        row for table in map_units(Slow, (1.0,), units, (1, 1), options, units_at_once=units_at_once) for row in table.to_pylist()
    ]
    assert sorted(row["unit"] for row in found) == list(range(4))
    assert max(row["running"] for row in found) == units_at_once


def test_a_worker_s_error_is_the_user_s_one_line(session: None, tmp_path: Path) -> None:
    root = write_inputs(tmp_path, documents=60)
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(root, "changed", compute=_COMPUTE))
    prepared = finescope("run", recipe, "--until", "sae", "--set", "compute.runner=local")
    assert prepared.code == 0, prepared.err
    changed = root / "corpus" / "part-1.parquet"
    os.utime(changed, (1, 1))
    ended = finescope("run", recipe, "--until", "embed")
    assert ended.code == 2
    expected = f"finescope: '{changed}' has changed since the corpus was indexed; give the changed corpus a new output"
    assert ended.errors == [expected]
    assert "Traceback" not in ended.err
    alone = finescope("run", recipe, "--until", "embed", "--set", "compute.runner=local")
    assert (alone.code, alone.errors) == (ended.code, ended.errors)
    state = json.loads((root / "runs" / "changed" / "run.json").read_text())["steps"]["embed"]
    assert state["state"] == "failed"
    assert "CorpusError" in state["error"]
