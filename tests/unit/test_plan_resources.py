"""A plan is held against the machine before anything runs."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from plan_inputs import by_step, inputs_at, recipe_of

from finescope import plan, storage
from finescope.curation.near_duplicates import SKETCH_BYTES
from finescope.curation.select import with_spare
from finescope.distillation import tracking
from finescope.errors import ResourceError
from finescope.plan import costs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs_at(tmp_path_factory.mktemp("plan"))


def test_a_tracker_that_is_not_installed_is_told_of_before_anything_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(root, tmp_path / "run", compute={"runner": "local", "track": ["wandb"]})
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"wandb needs wandb.*finescope\[track\]"):
        plan.check_resources(recipe)


def test_too_little_disk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr(storage, "free_bytes", lambda uri: asked.append(uri) or 1000)
    with pytest.raises(ResourceError, match=r"has 0\.00 GB free; the plan needs about 0\.00 GB"):
        plan.check_resources(recipe_of(root, tmp_path / "run"))
    assert asked == [str(tmp_path / "run")]
    monkeypatch.setattr(storage, "free_bytes", lambda uri: None)
    plan.check_resources(recipe_of(root, tmp_path / "run"))


def test_what_curate_puts_by_needs_a_local_disk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(root, tmp_path / "run")
    cost = by_step(costs(recipe))["curate"]
    text = cost.disk_bytes / cost.documents
    assert cost.scratch_bytes == pytest.approx(with_spare(cost.documents) * (text + SKETCH_BYTES), rel=0.01)
    exact = recipe.model_copy(update={"curate": recipe.curate.model_copy(update={"deduplicate": "exact"})})
    assert by_step(costs(exact))["curate"].scratch_bytes == pytest.approx(with_spare(cost.documents) * text, rel=0.01)
    remote = recipe.model_copy(update={"output": "memory://plan-test/run"})
    temporary = {tempfile.gettempdir(): cost.scratch_bytes}
    monkeypatch.setattr(storage, "free_bytes", temporary.get)
    plan.check_resources(remote)
    temporary[tempfile.gettempdir()] -= 1
    with pytest.raises(ResourceError, match=rf"TMPDIR: '{tempfile.gettempdir()}' has 0\.\d\d GB free"):
        plan.check_resources(remote)


def test_too_little_memory_names_the_step(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(root, tmp_path)
    largest = max(costs(recipe), key=lambda cost: cost.memory_bytes)
    monkeypatch.setattr(plan, "available_memory", lambda: largest.memory_bytes)
    plan.check_resources(recipe)
    monkeypatch.setattr(plan, "available_memory", lambda: largest.memory_bytes - 1)
    needed = f"step '{largest.step}' needs about {largest.memory_bytes / 1e9:.2f} GB of memory"
    with pytest.raises(ResourceError, match=needed):
        plan.check_resources(recipe)
    monkeypatch.setattr(plan, "available_memory", lambda: None)
    plan.check_resources(recipe)


@pytest.mark.parametrize(
    ("compute", "address", "checked"),
    [
        ({"runner": "ray"}, None, True),
        ({"runner": "ray", "address": "ray://head:10001"}, None, False),
        ({"runner": "ray"}, "auto", False),
        ({"runner": "local", "address": "ray://head:10001"}, "auto", True),
    ],
)
def test_memory_of_a_cluster_is_its_schedulers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: dict[str, Any], address: str | None, checked: bool
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(plan, "available_memory", lambda: 1)
    recipe = recipe_of(root, tmp_path, compute=compute)
    if checked:
        with pytest.raises(ResourceError, match="of memory"):
            plan.check_resources(recipe)
    else:
        plan.check_resources(recipe)


def machine(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / {"meminfo": "proc/meminfo"}.get(name, f"sys/fs/cgroup/memory.{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_available_memory(tmp_path: Path):
    assert plan.available_memory(tmp_path) is None
    machine(tmp_path, meminfo="MemTotal:       2000 kB\nMemAvailable:   1000 kB\n")
    assert plan.available_memory(tmp_path) == 1000 * 1024
    machine(tmp_path, max="max\n", current="900\n")
    assert plan.available_memory(tmp_path) == 1000 * 1024
    machine(tmp_path, max="1000\n")
    assert plan.available_memory(tmp_path) == 100
    machine(tmp_path, stat="anon 200\nfile 700\ninactive_file 600\n")
    assert plan.available_memory(tmp_path) == 700, "cache that the kernel gives back is not in use"
    assert (plan.available_memory() or 0) > 0
