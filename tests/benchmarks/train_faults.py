"""Trainings that are killed at random moments under Ray Train, and started again until they are done. Prints JSON.

    python tests/benchmarks/train_faults.py --runs 20

A student of a random model is trained by two processes, one a node. At a moment of the step `distill`, drawn from --seed, one
process gets SIGKILL: the driver, after which the same command is given again, or one that trains, which Ray Train replaces. A
quarter of the moments is anywhere in the step, most of which is no training; the others follow one of the checkpoints. All
steps before are taken from the undisturbed run. Then the weights must be those of the undisturbed run, bit for bit, each
training step be told of once, and no file, process or scratch be left over.

Two more runs, whose sums are taken in another order: one whose driver is killed goes on with one process in place of two; one
goes on under ZeRO 3 after ZeRO 2. Of these the largest difference of a weight is printed, beside that between the student before
and after its training. Exit code 1 where a run of the first kind is not equal, or one of the others differs by more than 1e-4.
"""

import argparse
import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign import (
    LIMIT_S,
    Blow,
    Nodes,
    begin_at,
    left_over,
    nodes,
    one_run,
    prepared,
    sweep,
    undisturbed_run,
)
from tiny_run import recipe_values, write_inputs

from finescope.checkpoints import complete_steps
from finescope.manifest import manifest_of

VICTIMS = ("driver", "RayTrainWorker")
UNTIL = "distill"
_EVERY = 4  # training steps between two checkpoints
_CLOSE = 1e-4


def recipe_of(root: Path, name: str, address: str, workers: int) -> tuple[Path, Path]:
    """The recipe's file and the output of a run: fast up to `distill`, and there some 60 steps."""
    values = recipe_values(
        root,
        name,
        compute={"runner": "ray", "address": address, "actors": 1, "memory_per_actor_gb": 0.1, "train_workers": workers},
        sae={"coordinates": {"method": "random", "count": 24}, "recovery_documents": 0, "epochs": 1},
        distill={"control": False, "rewrite_share": 0.1, "epochs": 20, "checkpoint_steps": _EVERY},
    )
    path = root / f"{name}-{workers}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, Path(values["output"])


def stands(output: Path) -> str:
    """Where the step is: its newest checkpoint, if there is one yet."""
    if (output / UNTIL / "model").exists():
        return "trained"
    steps = complete_steps(str(output / UNTIL / "checkpoints"))
    return f"after step {steps[0]}" if steps else "before the first checkpoint"


def largest_difference(model: Path, expected: Path) -> float:
    """Of a weight of two models; 0.0 where all are equal bit for bit."""
    import torch
    from safetensors.torch import load_file

    one, other = (load_file(directory / "model.safetensors") for directory in (model, expected))
    assert one.keys() == other.keys()
    return max(0.0 if torch.equal(one[name], other[name]) else float((one[name] - other[name]).abs().max()) for name in one)


def faults(output: Path, undisturbed: Path, scratch: Path) -> list[str]:
    """What of a run is not as in the undisturbed one, or should not be there."""
    import polars as pl

    found, losses = [], []
    for run in (output, undisturbed):
        metrics = pl.read_parquet(manifest_of(str(run), UNTIL).files("metrics"))
        losses.append(metrics.filter(pl.col("name") == "loss")["value"])
    if not losses[0].equals(losses[1]):
        found.append(f"losses: {losses[0].len()} for {losses[1].len()}, or others")
    return found + left_over(output, undisturbed, scratch)


def killed_runs(root: Path, there: Nodes, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that must end with the very same weights, and the one that goes on with one process."""
    scratch, undisturbed = root / "tmp", root / "runs" / "undisturbed"
    recipe, _ = recipe_of(root, undisturbed.name, there.cluster.address, 2)
    undisturbed_run(recipe, UNTIL, undisturbed)
    calm, stories = manifest_of(str(undisturbed), UNTIL), []
    for number in [*range(arguments.first, arguments.first + arguments.runs), "two-to-one"]:
        chance = random.Random(f"{arguments.seed} {number}")
        alone = number == "two-to-one"
        planned = Blow("driver" if alone else VICTIMS[int(number) % len(VICTIMS)], UNTIL, chance.uniform(0.0, calm.seconds))
        if alone or chance.random() < 0.75:
            step = _EVERY * chance.randrange(1, calm.facts["training_steps"] // _EVERY)
            planned = replace(planned, after=f"checkpoints/step-{step:08d}/done.json", seconds=chance.uniform(0.0, 1.0))
        recipe, output = recipe_of(root, f"run-{number}", there.cluster.address, 2)
        then, _ = recipe_of(root, f"run-{number}", there.cluster.address, 1 if alone else 2)
        begin_at(UNTIL, undisturbed, output)
        story = {"run": number} | one_run(recipe, UNTIL, output, there, planned, chance, stands, then)
        if "fault" not in story:
            models = (run / UNTIL / "model" for run in (output, undisturbed))
            story["largest_difference"] = largest_difference(*models)
            story["faults"] = left_over(output, undisturbed, scratch) if alone else faults(output, undisturbed, scratch)
        print(json.dumps(story), file=sys.stderr, flush=True)
        stories.append(story)
        sweep(scratch)
    return stories


def from_zero_2_to_3(root: Path) -> dict[str, Any]:
    """The recipe's `zero_stage` is part of the step's identity, hence the runner is called with one job and two stages."""
    from finescope.config import DistillSection
    from finescope.distillation.loop import TrainJob

    undisturbed = root / "runs" / "undisturbed"
    student, examples = undisturbed / "prune" / "model", undisturbed / UNTIL / "examples" / "part-000000.parquet"
    section = DistillSection.model_validate({**manifest_of(str(undisturbed), UNTIL).section, "zero_stage": 2})
    homes = [root / name for name in ("calm", "changed")]
    for home in homes:
        home.mkdir()
        job = TrainJob(str(student), str(examples), section, str(home / "checkpoints"), str(home / "out"))
        (home / "job").write_bytes(pickle.dumps(job))
    calm, changed = homes
    if _trained(calm, 2).wait(LIMIT_S):
        raise RuntimeError((calm / "log").read_text())
    first = _trained(changed, 2)
    while first.poll() is None and not complete_steps(str(changed / "checkpoints")):
        time.sleep(0.05)
    first.kill()
    codes, stood = [first.wait()], complete_steps(str(changed / "checkpoints"))[:1]
    codes.append(_trained(changed, 3).wait(LIMIT_S))
    story: dict[str, Any] = {"run": "zero-2-to-3", "at_work": f"after step {stood}", "codes": codes}
    if codes[-1]:
        return story | {"fault": (changed / "log").read_text()[-2000:]}
    models = [home / "out" / "model" for home in homes]
    moved = largest_difference(models[0], student)
    return story | {"largest_difference": largest_difference(*models), "training_moved_a_weight_by": moved, "faults": []}


def _trained(home: Path, stage: int) -> "subprocess.Popen[bytes]":
    with open(home / "log", "ab") as log:
        return subprocess.Popen([sys.executable, __file__, "--stage", str(stage), "--job", str(home)], stdout=log, stderr=log)


def train_job(home: Path, stage: int) -> None:
    """Two processes under one ZeRO stage, on a Ray session of their own."""
    import ray

    from finescope.distillation.loop import train
    from finescope.runners import ray_train
    from finescope.runners.base import Resources

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=os.environ["RAY_TMPDIR"])
    job = pickle.loads((home / "job").read_bytes())
    ray_train.train(train, (job,), lambda amount, note="": None, Resources(), 2, {"CPU": 1.0}, stage)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run: a campaign may be done in parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help="a new directory, kept; a short path")
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        train_job(arguments.job, arguments.stage)
        return
    with prepared(arguments.root) as root:
        write_inputs(root)
        with nodes(str(root / "ray")) as there:
            stories = killed_runs(root, there, arguments)
        changed = [stories.pop(), from_zero_2_to_3(root)]
    good = [story for story in stories if story.get("faults") == [] and story["largest_difference"] == 0.0]
    close = [story for story in changed if story.get("faults") == [] and story["largest_difference"] < _CLOSE]
    struck = Counter(f"{story['struck']}: {story['at_work']}" for story in stories)
    print(json.dumps({"runs": len(stories), "equal": len(good), "struck": struck, "stories": [*stories, *changed]}, indent=2))
    sys.exit(len(good) < len(stories) or len(close) < len(changed))


if __name__ == "__main__":
    main()
