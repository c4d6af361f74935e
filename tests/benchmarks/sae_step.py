"""A training step of a TopK dictionary: ours, a dense one by hand, the peers', and the floor. Prints JSON.

    OMP_NUM_THREADS=1 python tests/benchmarks/sae_step.py [--activations activations.npz]

CPU time of one thread; medians over rounds in which the trainers take turns, so that what else the machine does hits all
of them. Once with no dead latent, once with a tenth of them dead and AuxK at work on half as many as there are coordinates.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time

import numpy as np
import torch
from trainers import TIMED, Setting, peers, silence

SIZES = ((4096, 32), (16384, 64))
WARM, DEAD_SHARE = 2, 0.1


def data_of(file: str | None, width: int, rows: int) -> torch.Tensor:
    """Standardised activations [rows, width]: of layer 10 in the file of `activations.py`, else of a planted dictionary."""
    if file is not None:
        values = torch.from_numpy(np.load(file)["layer_10"][:rows])
    else:
        random = torch.Generator().manual_seed(0)
        directions = torch.randn(8192, width, generator=random)
        ids = torch.randint(0, 8192, (rows, 24), generator=random)
        weights = torch.rand(rows, 24, generator=random)
        values = torch.nn.functional.embedding_bag(ids, directions, per_sample_weights=weights, mode="sum")
    return (values - values.mean(0)) / values.std(0)


def time_steps(data: torch.Tensor, setting: Setting, dead: bool, rounds: int) -> dict[str, float]:
    """Tokens a CPU second, by trainer."""
    made = {name: make(setting, data) for name, make in {**TIMED, **peers()}.items()}
    batches = data.split(setting.batch)
    for trainer in made.values():
        if dead:
            silence(trainer, DEAD_SHARE)
        for number in range(WARM):
            trainer.step(batches[number])
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds):
        for name, trainer in made.items():
            began = time.process_time()
            trainer.step(batches[(WARM + number) % (len(batches) - 1)])
            seconds[name].append(time.process_time() - began)
    return {name: setting.batch / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--activations")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=2048)
    arguments = parser.parse_args()
    data = data_of(arguments.activations, 576, 16 * arguments.batch)
    results = []
    for num_latents, k in SIZES:
        for dead in (False, True):
            # Of 100 steps ours keeps the figures of every second. Dead after one step, so that the silent ones are; those that
            # win now and then are revived by their wins.
            after = arguments.batch if dead else 10_000_000
            setting = Setting(data.shape[1], num_latents, k, arguments.batch, 100, dead_after=after)
            speed = time_steps(data, setting, dead, arguments.rounds)
            ratios = {f"ours_to_{name}": speed["ours"] / value for name, value in speed.items() if name != "ours"}
            results.append({"num_latents": num_latents, "k": k, "auxk": dead, "tokens_per_second": speed, **ratios})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    machine = {"processor": platform.processor(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    print(json.dumps({"machine": machine, "torch": torch.__version__, "batch": arguments.batch, "results": results}, indent=2))


if __name__ == "__main__":
    main()
