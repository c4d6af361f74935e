"""Runs that are killed on purpose on two Ray nodes of this machine, and started again until they are done."""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from finescope.config import STEPS

# In the environment of every process of the campaign: whose it is.
_MARK = "FINESCOPE_KILL_CAMPAIGN"
_ATTEMPTS = 6  # starts of one run, at most
LIMIT_S = 600.0  # of one start
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


@contextlib.contextmanager
def prepared(given: Path | None) -> Iterator[Path]:
    """A root with `tmp` (every process's scratch), `ray` and `runs` in it; kept where it is `given`, which must be new."""
    with contextlib.ExitStack() as stack:
        root = given or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fk", dir="/tmp")))
        for directory in (root / "tmp", root / "runs", root / "ray" / "ray"):  # Ray writes its address into the last
            directory.mkdir(parents=True)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        os.environ |= {"TMPDIR": str(root / "tmp"), "RAY_TMPDIR": str(root / "ray"), _MARK: str(root)}
        tempfile.tempdir = None
        yield root


def started(recipe: Path, until: str, log: Path) -> "subprocess.Popen[bytes]":
    """The command, in a process of its own; what it says is added to `log`."""
    command = [sys.executable, "-c", "from finescope.cli import main; main()", "run", str(recipe), "--until", until]
    with open(log, "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


def undisturbed_run(recipe: Path, until: str, output: Path) -> None:
    """Let one run end."""
    log = output.with_suffix(".log")
    if started(recipe, until, log).wait(LIMIT_S):
        raise RuntimeError(log.read_text())


def workers(kind: str = "") -> list[psutil.Process]:
    """Ray's actors and tasks of this campaign that are at work now; `kind`: what their titles begin with."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            title = " ".join(process.info["cmdline"] or ())
            ours = title.startswith(f"ray::{kind}") and not title.removeprefix("ray::").startswith(("IDLE", *_OF_RAY))
            if ours and _MARK in process.environ():
                found.append(process)
    return found


def strike(victim: str, driver: "subprocess.Popen[bytes]", there: Nodes, chance: random.Random) -> str | None:
    """Kill the "driver", the "raylet" of the second node, or one of the `workers` of this kind ("actor": of any).

    What was killed, or None where the run ended first.
    """
    if driver.poll() is not None:
        return None
    if victim == "driver":
        driver.kill()
        return "driver"
    if victim == "raylet":
        there.lose_second()
        return "raylet"
    while driver.poll() is None:
        if found := sorted(workers("" if victim == "actor" else victim), key=lambda process: process.pid):
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
    """What is killed, and when: so many seconds after a step has begun, or after another file of it is there."""

    victim: str
    step: str
    seconds: float
    after: str = "step.json"


def begin_at(step: str, undisturbed: Path, output: Path) -> None:
    """Give the run the steps before `step`, as the undisturbed one did them."""
    record = json.loads((undisturbed / "run.json").read_text())
    before = [name for name in STEPS[: STEPS.index(step)] if name in record["steps"]]
    for name in before:
        shutil.copytree(undisturbed / name, output / name)
    output.mkdir(exist_ok=True)
    (output / "run.json").write_text(json.dumps(record | {"steps": {name: record["steps"][name] for name in before}}))


def one_run(
    recipe: Path,
    until: str,
    output: Path,
    there: Nodes,
    planned: Blow,
    chance: random.Random,
    look: Callable[[Path], str] = at_work,
    then: Path | None = None,
) -> dict[str, Any]:
    """Start the run, strike once, start it again until it ends well; what happened.

    `look` tells what was at work when the blow fell; `then` is another recipe for the starts after it.
    """
    log = output.with_suffix(".log")
    story: dict[str, Any] = {"victim": planned.victim, "step": planned.step, "codes": []}
    story |= {"after": planned.after, "seconds_later": round(planned.seconds, 1)}
    begun = time.monotonic()
    while not story["codes"] or story["codes"][-1] != 0:
        if len(story["codes"]) == _ATTEMPTS:
            return story | {"fault": f"not done after {_ATTEMPTS} starts"}
        driver = started(then if then and story["codes"] else recipe, until, log)
        if "struck" not in story:
            while driver.poll() is None and not (output / planned.step / planned.after).exists():
                time.sleep(_POLL_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(planned.seconds)
            story |= {"at_work": look(output), "struck": strike(planned.victim, driver, there, chance)}
            if story["struck"] == "raylet":
                time.sleep(chance.uniform(0.0, 5.0))
                there.bring_back()
        try:
            story["codes"].append(driver.wait(LIMIT_S))
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
            return story | {"fault": f"hung for {LIMIT_S:.0f} s"}
    return story | {"seconds": round(time.monotonic() - begun, 1)}


def left_over(output: Path, undisturbed: Path, scratch: Path) -> list[str]:
    """Files, scratch and processes of a run that the undisturbed one has not, and files that only that one has."""
    expected, files = files_below(undisturbed), files_below(output)
    found = [f"{path}: left over" for path in sorted(files - expected) if not path.startswith("logs/")]
    found += [f"{path}: missing" for path in sorted(expected - files)]
    found += [f"{path.name}: scratch left over" for path in scratch.iterdir()]
    deadline = time.monotonic() + _ORPHAN_S
    while (orphans := workers()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found + [f"process {' '.join(orphan.cmdline())[:60]} left over" for orphan in orphans]


def files_below(output: Path, directory: str = "") -> set[str]:
    """Paths, relative to `output`, of what is in a directory of it."""
    return {path.relative_to(output).as_posix() for path in (output / directory).rglob("*") if path.is_file()}


def sweep(scratch: Path) -> None:
    """Empty it, so that what one run left is not counted against the next."""
    for left in scratch.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
