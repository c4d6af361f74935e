"""Memory of training a dictionary against the number of tokens: it must be flat. Prints JSON.

    python tests/benchmarks/sae_memory.py

Each training is a process of its own; its peak resident memory is what the system says when it has ended.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import torch

from finescope.config import SaeSection
from finescope.sae.fit import FitPlan, fit

WIDTH, CHUNK = 128, 20_000


def stream(start: int, stop: int, step: int) -> Iterator[np.ndarray]:
    """Made when they are asked for, as activations are."""
    for number in range(start, stop, step):
        yield np.random.default_rng(number).normal(size=(CHUNK, WIDTH)).astype(np.float32)


def train(tokens: int, buffer_mib: float) -> None:
    section = SaeSection.model_validate({"num_latents": 2048, "num_tokens": tokens, "buffer_mib": buffer_mib})
    fit(FitPlan((section,), ((0, WIDTH),), tokens // CHUNK + 2, 1, None), stream, torch.device("cpu"), lambda _: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[200_000, 400_000, 800_000, 1_600_000])
    parser.add_argument("--buffer-mib", type=float, default=64.0)
    parser.add_argument("--one", type=int)
    arguments = parser.parse_args()
    if arguments.one:
        train(arguments.one, arguments.buffer_mib)
        return
    rows = []
    for tokens in arguments.tokens:
        command = [sys.executable, __file__, "--one", str(tokens), "--buffer-mib", str(arguments.buffer_mib)]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        rows.append({"tokens": tokens, "peak_bytes": peak})
    growth = rows[-1]["peak_bytes"] / rows[0]["peak_bytes"] - 1
    print(json.dumps({"buffer_mib": arguments.buffer_mib, "rows": rows, "growth_of_last_over_first": growth}, indent=2))


if __name__ == "__main__":
    main()
