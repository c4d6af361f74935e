"""A driver that is killed, again and again: the same command ends where an undisturbed run does, and does nothing twice."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
import torch
from cli_runs import Ended, Finished, ended, finescope, leftovers, stamps, start, states, write_recipe
from safetensors.torch import load_file
from tiny_run import recipe_values

from finescope.config import STEPS

# Five runs one after the other, each of which imports torch: minutes where the machine is busy.
pytestmark = pytest.mark.timeout(1200)

_UNITS = 40
# A blow that comes too late is no test: it is tried so many times.
_ATTEMPTS = 5


class Killed(NamedTuple):
    """What a kill in one step left, and what the next start of the same command kept of it."""

    states: dict[str, str]
    files: dict[str, int]  # of the step: when each was written (ns)


class Story(NamedTuple):
    """A run that was killed in sae, in embed, in curate, in teach and in distill, and then let end."""

    output: Path
    killed: dict[str, Killed]
    last: Ended


@pytest.fixture(scope="module")
def story(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Story:
    home = tmp_path_factory.mktemp("killed")
    output = home / "run"
    recipe = write_recipe(home / "recipe.yaml", recipe_values(finished.root, "killed") | {"output": str(output)})
    embedded, checkpoints = output / "embed" / "units", output / "distill" / "checkpoints"
    moments: dict[str, Callable[[], bool]] = {
        "sae": lambda: any((output / "sae" / "checkpoints").glob("*/done.json")),
        "embed": lambda: sum(1 for _ in embedded.glob("*.json")) >= 3,
        "curate": lambda: (output / "curate").exists() and states(output).get("curate") == "running",
        "teach": lambda: any((output / "teach" / "units").glob("*.json")),
        "distill": lambda: any(checkpoints.glob("*/done.json")),
    }
    killed = {step: _kill(recipe, output, step, moment) for step, moment in moments.items()}
    # What a blow between a file's writing and its renaming leaves: at the top, in a step, beside a checkpoint.
    for place in (output, output / "distill", checkpoints):
        (place / ".tmp-of-the-killed").write_text("half")
    return Story(output, killed, ended(start(["run", recipe])))


def _kill(recipe: str, output: Path, step: str, moment: Callable[[], bool]) -> Killed:
    """Start the command, and kill it when the moment in this step has come."""
    for _ in range(_ATTEMPTS):
        process = start(["run", recipe])
        while not moment():
            if process.poll() is not None:
                pytest.fail(f"it ended before {step}: {ended(process).err}")
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert ended(process).code == -signal.SIGKILL
        if not (output / step / "manifest.json").exists():
            return Killed(states(output), stamps(output / step))
        for path in output.glob("*/"):
            if path.is_dir() and STEPS.index(path.name) >= STEPS.index(step):
                shutil.rmtree(path)
    pytest.fail(f"{step} was over {_ATTEMPTS} times before it was killed")


@pytest.mark.parametrize("step", ["sae", "embed", "curate", "teach", "distill"])
def test_it_was_killed_in_the_middle_of(story: Story, step: str) -> None:
    killed = story.killed[step]
    assert killed.states[step] == "running"
    assert list(killed.states) == list(STEPS[: STEPS.index(step) + 1])
    assert "manifest.json" not in killed.files
    assert "step.json" in killed.files


def test_the_same_command_goes_on_to_the_end(story: Story) -> None:
    assert story.last.code == 0, story.last.err
    assert states(story.output) == dict.fromkeys(STEPS, "done")
    assert leftovers(story.output) == []


def test_only_unfinished_units_are_embedded_again(story: Story) -> None:
    killed, now = story.killed["embed"], stamps(story.output / "embed")
    done = [name.split("/")[1].removesuffix(".json") for name in killed.files if name.startswith("units/")]
    done = [name for name in done if not name.startswith(".")]
    assert 0 < len(done) < _UNITS
    kept = [f"units/{number}.json" for number in done] + [f"embeddings/part-{number}.parquet" for number in done]
    assert {name: killed.files[name] for name in kept} == {name: now[name] for name in kept}
    assert sum(1 for name in now if name.startswith("units/")) == _UNITS


def test_what_was_written_is_not_written_again(story: Story) -> None:
    killed, now = story.killed["teach"].files, stamps(story.output / "teach")
    written = ["units/000000.json", "rewrites/part-000000.parquet"]
    assert {name: killed[name] for name in written} == {name: now[name] for name in written}
    assert "units/000001.json" not in killed, "the control's"
    assert "units/000001.json" in now


def test_the_training_went_on_from_its_checkpoint(story: Story) -> None:
    metrics = pl.read_parquet(story.output / "distill" / "metrics" / "*.parquet").filter(pl.col("name") == "loss")
    newest = max(time for name, time in story.killed["distill"].files.items() if name.endswith("done.json"))
    before = metrics.filter(pl.col("time").dt.epoch("ns") < newest)
    assert 0 < before.height < metrics.height


def test_rows_add_up(story: Story) -> None:
    for step in STEPS:
        manifest = json.loads((story.output / step / "manifest.json").read_text())
        assert manifest["rows_in"] == manifest["rows_out"] + manifest["rejects"]


@pytest.mark.parametrize(
    ("step", "table"),
    [
        *(("sae", "latents"), ("embed", "embeddings"), ("curate", "curated")),
        *(("teach", "rewrites"), ("teach", "control_rewrites")),
    ],
)
def test_tables_are_those_of_an_undisturbed_run(finished: Finished, story: Story, step: str, table: str) -> None:
    expected, found = (sorted((output / step / table).iterdir()) for output in (finished.output, story.output))
    assert [path.name for path in found] == [path.name for path in expected]
    for one, other in zip(found, expected, strict=True):
        assert pl.read_parquet(one).equals(pl.read_parquet(other))


def test_the_dictionary_is_that_of_an_undisturbed_run(finished: Finished, story: Story) -> None:
    expected, found = (
        load_file(output / "sae" / "dictionary" / "dictionary.safetensors") for output in (finished.output, story.output)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("student", ["distill/model", "distill/control/model"])
def test_weights_are_those_of_an_undisturbed_run(finished: Finished, story: Story, student: str) -> None:
    expected, found = (load_file(output / student / "model.safetensors") for output in (finished.output, story.output))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_blow_after_the_training_leaves_no_checkpoint(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished.output, output)
    (output / "distill" / "manifest.json").unlink()
    for folder in ("", "control"):
        checkpoint = output / "distill" / folder / "checkpoints" / "step-00000006"
        checkpoint.mkdir(parents=True)
        (checkpoint / "done.json").write_text("{}")
    trained = stamps(output / "distill" / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(finished.root, "blow") | {"output": str(output)})
    again = finescope("run", recipe, "--until", "distill")
    assert again.code == 0, again.err
    assert leftovers(output) == []
    assert stamps(output / "distill" / "model") == trained
