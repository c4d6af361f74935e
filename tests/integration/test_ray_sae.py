"""Dictionaries on Ray: two processes that train together, each fed by actors, and one process that does it all."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from cli_runs import SilentReporter
from safetensors.torch import load_file
from tiny_run import tiny_recipe, write_inputs

from finescope import pipeline
from finescope.manifest import Manifest
from finescope.runners.base import Resources, Source
from finescope.runners.ray_data import UnitStream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

_SAE = {"workers": 2, "variants": [{"seed": 1}, {"layer": 1, "architecture": "batch_topk"}]}
_COMPUTE = {"runner": "ray", "actors": 2, "memory_per_actor_gb": 0.1}


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with (
        tempfile.TemporaryDirectory(prefix="rs", dir="/tmp", ignore_cleanup_errors=True) as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_worker_niceness", "0")
        # The workers below are classes of this file, which no other process can import.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=directory)
        yield
        ray.shutdown()


class _Numbers:
    """Two rows a unit: its number, and how long it took to come."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch.column("unit").to_pylist()
        return pa.table({"value": [10 * unit, 10 * unit + 1]})


def test_a_stream_comes_in_order_and_starts_anywhere(session: None) -> None:
    units = pa.table({"unit": list(range(40))})
    stream = UnitStream(Source(_Numbers, (), units, Resources(), 2**20), (1, 2), {"num_cpus": 0.5})
    for start, stop, step in ((0, 40, 1), (7, 40, 3), (39, 40, 1), (5, 5, 1)):
        found = [value for table in stream(start, stop, step) for value in table.column("value").to_pylist()]
        assert found == [10 * number + extra for number in range(start, stop, step) for extra in (0, 1)]


class _Sizes:
    """As many rows as the unit's number says."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch.column("unit").to_pylist()
        return pa.table({"value": pa.array(range(unit), pa.int64())})


def test_a_unit_is_one_result_whatever_its_size(session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data would drop what is empty, and cut what is larger than its blocks, of which these are many times the size."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 1000)
    sizes = [3, 0, 20_000, 0, 1]
    stream = UnitStream(Source(_Sizes, (), pa.table({"unit": sizes}), Resources(), 2**20), (1, 1), {"num_cpus": 0.5})
    assert [table.num_rows for table in stream(0, 5, 1)] == sizes


def trained(root: Path, name: str, **compute: Any) -> Manifest:
    return pipeline.run(tiny_recipe(root, name, sae=_SAE, compute=compute), SilentReporter(), "sae")["sae"]


def test_two_processes_train_the_dictionaries_of_one(session: None, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    here, there = trained(tmp_path, "local", runner="local"), trained(tmp_path, "ray", **_COMPUTE)
    for place in ("dictionary", "variants/seed-1", "variants/layer-1-architecture-batch_topk"):
        one, other = (load_file(Path(run.uri) / place / "dictionary.safetensors") for run in (here, there))
        assert one.keys() == other.keys()
        for name, expected in one.items():
            assert torch.equal(other[name], expected), (place, name)
    assert here.facts["history_steps"] == there.facts["history_steps"]
    assert here.facts["fvu"] == there.facts["fvu"]
    assert there.facts["measures"] == pytest.approx(here.facts["measures"], rel=1e-4)
    assert (here.rows_in, here.rows_out) == (there.rows_in, there.rows_out)
