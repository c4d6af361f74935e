"""Runs that are killed at random moments on two Ray nodes, and started again until they are done. Prints JSON.

    python tests/benchmarks/kill_campaign.py --runs 30

Each run goes from `index` to `curate` on a random model with two actors, one a node. At a moment of the undisturbed run, drawn
from --seed, one process gets SIGKILL: the driver, an actor, or the raylet of the second node (with all that runs under it; the
node comes back, as an autoscaler would bring it). Steps that are over at that moment are taken from the undisturbed run, unless
--whole is given. The same command is given again until it ends well. Then the run must hold what the undisturbed one holds: equal
tables of the same shards, no other file, no process and no scratch. Exit code 1 where one does not.
"""

import argparse
import bisect
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign import Blow, begin_at, files_below, left_over, nodes, one_run, prepared, sweep, undisturbed_run
from tiny_run import recipe_values, write_inputs

from finescope.config import STEPS
from finescope.manifest import manifest_of

VICTIMS = ("driver", "actor", "raylet")
UNTIL = "curate"
_STEPS = STEPS[: STEPS.index(UNTIL) + 1]
TABLES = {"index": "documents", "sae": "latents", "embed": "embeddings", "score": "scores", "curate": "curated"}


def blow(number: int, undisturbed: Path, chance: random.Random) -> Blow:
    """A moment uniform over the steps of the undisturbed run."""
    lengths = {step: manifest_of(str(undisturbed), step).seconds for step in _STEPS}
    moment = chance.uniform(0.0, sum(lengths.values()))
    ends = list(itertools.accumulate(lengths.values()))
    at = min(bisect.bisect(ends, moment), len(_STEPS) - 1)
    return Blow(VICTIMS[number % len(VICTIMS)], _STEPS[at], moment - (ends[at] - lengths[_STEPS[at]]))


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
            found += [f"{path}: not in the manifest" for path in files_below(output, f"{step}/{name}") - named]
    return found + left_over(output, undisturbed, scratch)


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
    scratch, undisturbed = root / "tmp", root / "runs" / "undisturbed"
    write_inputs(root, documents=arguments.documents, files=3, rows_per_group=-(-arguments.documents // 12))
    stories: list[dict[str, Any]] = []
    end = arguments.first + arguments.runs
    for first in range(arguments.first, end, arguments.per_cluster):
        with nodes(str(root / "ray")) as there:
            if not undisturbed.exists():
                recipe, _ = recipe_of(root, undisturbed.name, there.cluster.address)
                undisturbed_run(recipe, UNTIL, undisturbed)
            for number in range(first, min(first + arguments.per_cluster, end)):
                chance = random.Random(f"{arguments.seed} {number}")
                planned = blow(number, undisturbed, chance)
                recipe, output = recipe_of(root, f"run-{number}", there.cluster.address)
                if not arguments.whole:
                    begin_at(planned.step, undisturbed, output)
                story = {"run": number} | one_run(recipe, UNTIL, output, there, planned, chance)
                if "fault" not in story:
                    story["faults"] = faults(output, undisturbed, scratch)
                print(json.dumps(story), file=sys.stderr, flush=True)
                stories.append(story)
                sweep(scratch)
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
    with prepared(arguments.root) as root:
        result = campaign(root, arguments)
    print(json.dumps(result, indent=2))
    sys.exit(result["equal_and_clean"] != result["runs"])


if __name__ == "__main__":
    main()
