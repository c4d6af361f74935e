"""Runs that are killed at random moments on two Ray nodes, and started again until they are done. Prints JSON.

    python tests/benchmarks/kill_campaign.py --runs 30

Each run goes from `index` to `curate` on a random model with two actors, one a node. At a moment of the undisturbed run, drawn
from --seed, one process gets SIGKILL: the driver, an actor, or the raylet of the second node (with all that runs under it; the
node comes back, as an autoscaler would bring it). Steps that are over at that moment are taken from the undisturbed run, unless
--whole is given. The same command is given again until it ends well. Then the run must hold what the undisturbed one holds: equal
tables of the same shards, no other file, no process and no scratch. Exit code 1 where one does not.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_run import recipe_values, write_inputs

from finescope.config import STEPS
from finescope.manifest import manifest_of

VICTIMS = ("driver", "actor", "raylet")
UNTIL = "curate"
_STEPS = STEPS[: STEPS.index(UNTIL) + 1]
TABLES = {"index": "documents", "sae": "latents", "embed": "embeddings", "score": "scores", "curate": "curated"}
# In the environment of every process of the campaign: whose it is.
_MARK = "FINESCOPE_KILL_CAMPAIGN"
_ATTEMPTS = 6  # starts of one run, at most
_LIMIT_S = 600.0  # of one start
_ORPHAN_S = 60.0  # in which the processes of an ended driver must be gone
_POLL_S = 0.02
# Detached actors that Ray keeps for the cluster, whoever asked for them; they hold no CPU. The cleaner ends itself from a thread,
# which Ray does not let it.
_OF_RAY = ("ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor", "PlacementGroupCleaner", "AutoscalingRequester")


@dataclass
class Nodes:
    """A Ray cluster of two nodes of one CPU each on this machine, the second of which can be lost."""

    cluster: Any
    second: Any

    def lose_second(self) -> None:
        """SIGKILL for its raylet alone: what ran under it must find out by itself."""
        (raylet,) = (entry.process for entry in self.second.all_processes["raylet"])
        os.kill(raylet.pid, signal.SIGKILL)
        raylet.wait()

    def bring_back(self) -> None:
        """Another node in place of the one that was lost."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(num_cpus=1)


@contextlib.contextmanager
def nodes(directory: str) -> Iterator[Nodes]:
    """The cluster, its files below `directory` (a short path: sockets are there)."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": directory, "gcs_server_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Nodes(cluster, cluster.add_node(num_cpus=1))
    finally:
        cluster.shutdown()


def started(recipe: Path, log: Path) -> "subprocess.Popen[bytes]":
    """The command, in a process of its own; what it says is added to `log`."""
    command = [sys.executable, "-c", "from finescope.cli import main; main()", "run", str(recipe), "--until", UNTIL]
    with open(log, "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


def workers() -> list[psutil.Process]:
    """Ray's actors and tasks of this campaign that are at work now."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            title = " ".join(process.info["cmdline"] or ())
            ours = title.startswith("ray::") and not title.removeprefix("ray::").startswith(("IDLE", *_OF_RAY))
            if ours and _MARK in process.environ():
                found.append(process)
    return found


def strike(victim: str, driver: "subprocess.Popen[bytes]", there: Nodes, chance: random.Random) -> str | None:
    """Kill it; what was killed, or None where the run ended first."""
    if driver.poll() is not None:
        return None
    if victim == "driver":
        driver.kill()
        return "driver"
    if victim == "raylet":
        there.lose_second()
        return "raylet"
    while driver.poll() is None:
        if found := sorted(workers(), key=lambda process: process.pid):
            chosen = chance.choice(found)
            with contextlib.suppress(psutil.NoSuchProcess):
                title = chosen.cmdline()[0]
                chosen.kill()
                return title
        time.sleep(_POLL_S)
    return None


def at_work(output: Path) -> str:
    """The step that is being done."""
    with contextlib.suppress(FileNotFoundError):
        states = json.loads((output / "run.json").read_text())["steps"]
        return next((name for name, step in states.items() if step["state"] == "running"), "between")
    return "start"


@dataclass(frozen=True)
class Blow:
    """What is killed, and when: so many seconds after a step has begun."""

    victim: str
    step: str
    seconds: float


def blow(number: int, undisturbed: Path, chance: random.Random) -> Blow:
    """A moment uniform over the steps of the undisturbed run."""
    lengths = {step: manifest_of(str(undisturbed), step).seconds for step in _STEPS}
    moment = chance.uniform(0.0, sum(lengths.values()))
    for step in _STEPS:
        if moment < lengths[step]:
            break
        moment -= lengths[step]
    return Blow(VICTIMS[number % len(VICTIMS)], step, moment)


def begin_at(step: str, undisturbed: Path, output: Path) -> None:
    """Give the run the steps before `step`, as the undisturbed one did them."""
    before = _STEPS[: _STEPS.index(step)]
    for name in before:
        shutil.copytree(undisturbed / name, output / name)
    record = json.loads((undisturbed / "run.json").read_text())
    output.mkdir(exist_ok=True)
    (output / "run.json").write_text(json.dumps(record | {"steps": {name: record["steps"][name] for name in before}}))


def one_run(recipe: Path, output: Path, there: Nodes, planned: Blow, chance: random.Random) -> dict[str, Any]:
    """Start the run, strike once, start it again until it ends well; what happened."""
    log = output.with_suffix(".log")
    story: dict[str, Any] = {"victim": planned.victim, "step": planned.step, "after_s": round(planned.seconds, 1), "codes": []}
    begun = time.monotonic()
    while not story["codes"] or story["codes"][-1] != 0:
        if len(story["codes"]) == _ATTEMPTS:
            return story | {"fault": f"not done after {_ATTEMPTS} starts"}
        driver = started(recipe, log)
        if "struck" not in story:
            while driver.poll() is None and not (output / planned.step / "step.json").exists():
                time.sleep(_POLL_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(planned.seconds)
            story |= {"at_work": at_work(output), "struck": strike(planned.victim, driver, there, chance)}
            if story["struck"] == "raylet":
                time.sleep(chance.uniform(0.0, 5.0))
                there.bring_back()
        try:
            story["codes"].append(driver.wait(_LIMIT_S))
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
            return story | {"fault": f"hung for {_LIMIT_S:.0f} s"}
    return story | {"seconds": round(time.monotonic() - begun, 1)}


def faults(output: Path, undisturbed: Path, scratch: Path) -> list[str]:
    """What of a run is not as in the undisturbed one, or should not be there."""
    import polars as pl

    found = []
    for step, table in TABLES.items():
        expected, there = (manifest_of(str(run), step) for run in (undisturbed, output))
        if [file.path for file in there.tables[table].files] != [file.path for file in expected.tables[table].files]:
            found.append(f"{table}: other shards")
        elif not pl.read_parquet(there.files(table)).equals(pl.read_parquet(expected.files(table))):
            found.append(f"{table}: other rows")
        if there.rows_in != there.rows_out + there.rejects or there.rows_out != expected.rows_out:
            found.append(f"{step}: counts")
        named = {f"{step}/{file.path}" for one in there.tables.values() for file in one.files}
        for name in there.tables:
            found += [f"{path}: not in the manifest" for path in _below(output, f"{step}/{name}") - named]
    expected_files, files = _below(undisturbed, ""), _below(output, "")
    found += [f"{path}: left over" for path in sorted(files - expected_files) if not path.startswith("logs/")]
    found += [f"{path}: missing" for path in sorted(expected_files - files)]
    found += [f"{path.name}: scratch left over" for path in scratch.iterdir()]
    deadline = time.monotonic() + _ORPHAN_S
    while (orphans := workers()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found + [f"process {' '.join(orphan.cmdline())[:60]} left over" for orphan in orphans]


def _below(output: Path, directory: str) -> set[str]:
    return {path.relative_to(output).as_posix() for path in (output / directory).rglob("*") if path.is_file()}


def recipe_of(root: Path, name: str, address: str) -> tuple[Path, Path]:
    """The recipe's file and the output of a run."""
    compute = {"runner": "ray", "address": address, "actors": 2, "memory_per_actor_gb": 0.1}
    # Random coordinates and no recovered loss: what is left has every kind of work, and starts fewer pools of actors.
    sae = {"coordinates": {"method": "random", "count": 24}, "recovery_documents": 0}
    values = recipe_values(root, name, compute=compute, sae=sae)
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, Path(values["output"])


def campaign(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs, a fresh cluster for every `per_cluster` of them."""
    scratch, sessions = root / "tmp", root / "ray"
    for directory in (scratch, root / "runs", sessions / "ray"):  # Ray writes its address into the last
        directory.mkdir(parents=True)
    os.environ |= {"TMPDIR": str(scratch), "RAY_TMPDIR": str(sessions), _MARK: str(root)}
    tempfile.tempdir = None
    write_inputs(root, documents=arguments.documents, files=3, rows_per_group=-(-arguments.documents // 12))
    stories: list[dict[str, Any]] = []
    undisturbed = root / "runs" / "undisturbed"
    end = arguments.first + arguments.runs
    for first in range(arguments.first, end, arguments.per_cluster):
        with nodes(str(sessions)) as there:
            if not undisturbed.exists():
                recipe, _ = recipe_of(root, undisturbed.name, there.cluster.address)
                if started(recipe, undisturbed.with_suffix(".log")).wait(_LIMIT_S):
                    raise RuntimeError(undisturbed.with_suffix(".log").read_text())
            for number in range(first, min(first + arguments.per_cluster, end)):
                chance = random.Random(f"{arguments.seed} {number}")
                planned = blow(number, undisturbed, chance)
                recipe, output = recipe_of(root, f"run-{number}", there.cluster.address)
                if not arguments.whole:
                    begin_at(planned.step, undisturbed, output)
                story = {"run": number} | one_run(recipe, output, there, planned, chance)
                if "fault" not in story:
                    story["faults"] = faults(output, undisturbed, scratch)
                print(json.dumps(story), file=sys.stderr, flush=True)
                stories.append(story)
                for left in scratch.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
    good = [story for story in stories if story.get("faults") == []]
    struck = Counter(f"{story['victim']} in {story['at_work']}" for story in stories if story["struck"])
    summary = {"runs": len(stories), "equal_and_clean": len(good), "struck": dict(sorted(struck.items()))}
    return summary | {"starts": sum(len(story["codes"]) for story in stories), "stories": stories}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="number of the first run: a campaign may be done in parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=360)
    parser.add_argument("--per-cluster", type=int, default=10, help="runs on one cluster before it is started anew")
    parser.add_argument("--whole", action="store_true", help="do every step in every run")
    parser.add_argument("--root", type=Path, help="a new directory, kept; a short path")
    arguments = parser.parse_args()
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {**environment, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    with contextlib.ExitStack() as stack:
        root = arguments.root or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fk", dir="/tmp")))
        root.mkdir(exist_ok=True)
        result = campaign(root, arguments)
    print(json.dumps(result, indent=2))
    sys.exit(result["equal_and_clean"] != result["runs"])


if __name__ == "__main__":
    main()
