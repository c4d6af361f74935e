"""Quality of TopK dictionaries: ours and the peers', on the same activations, in the same number of steps. Prints JSON.

    python tests/benchmarks/sae_quality.py --activations activations.npz

FVU is that of held-out documents' activations, over all of them; a latent is dead if it is active on none of the training
activations, by the weights at the end. Twice: `standardised`, all trained on coordinates of variance 1; `raw`, the peers on the
activations as they are but for one scale (their own practice), ours on them through its own standardisation. The FVU is given in
both units. Each peer runs with its own learning rate and with others, ours among them.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trainers import Ours, Setting, StepTrainer, peers

from finescope.sae.fvu import FvuMeter

HELD_OUT = 0.05  # of the documents


def split(file: str, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Activations to train on and held out, of different documents."""
    arrays = np.load(file)
    values, document = torch.from_numpy(arrays[f"layer_{layer}"]), arrays["document"]
    held_out = np.isin(document, np.flatnonzero(np.random.default_rng(0).random(document.max() + 1) < HELD_OUT))
    mixed = torch.randperm(int((~held_out).sum()), generator=torch.Generator().manual_seed(0))[:tokens]
    return values[torch.from_numpy(~held_out)][mixed], values[torch.from_numpy(held_out)]


def train(trainer: StepTrainer, data: Tensor, setting: Setting, epochs: int) -> Tensor:
    """`epochs` passes in the same order for all; which latents were active in the last one (by the weights at its end)."""
    random, done = torch.Generator().manual_seed(1), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=random).split(setting.batch):
            if len(rows) == setting.batch and done < setting.steps:
                trainer.step(data[rows])
                done += 1
    assert done == setting.steps, (done, setting.steps)
    return torch.stack([trainer.reconstruct(batch)[1].any(0) for batch in data.split(4096)]).any(0)


def measure(trainer: StepTrainer, held_out: Tensor, mean: Tensor, scale: Tensor) -> dict[str, float]:
    """FVU in the units that the trainer sees, and in those of `scale` (both of the same reconstruction); L0."""
    seen, other, active = FvuMeter(), FvuMeter(), 0
    for batch in held_out.split(2048):
        reconstruction, latents = trainer.reconstruct(batch)
        seen.update(batch, reconstruction)
        other.update((batch - mean) / scale, (reconstruction - mean) / scale)
        active += int(latents.sum())
    return {"fvu": seen.value, "fvu_rescaled": other.value, "l0": active / len(held_out)}


def compare(
    data: Tensor, held_out: Tensor, setting: Setting, epochs: int, raw: bool, rates: list[float | None], names: list[str]
) -> list[dict[str, Any]]:
    """A row a trainer and learning rate."""
    mean, scale = data.mean(0), data.std(0)
    rows = []
    makers: dict[str, Any] = {"ours": Ours, **peers()}
    for name, make in ((name, make) for name, make in makers.items() if name in names):
        standardised = not raw or name == "ours"
        # What a peer sees of raw activations: one scale for all, so that the mean norm is the root of the width.
        factor = data.shape[1] ** 0.5 / data.norm(dim=1).mean()
        train_on = (data - mean) / scale if standardised else data * factor
        test_on = (held_out - mean) / scale if standardised else held_out * factor
        # From what is seen to the other units: raw ones where standardised ones are seen, and the other way round.
        back = (-mean / scale, 1 / scale) if standardised else (mean * factor, scale * factor)
        for rate in (None,) if name == "ours" else rates:
            chosen = Setting(**{**vars(setting), "learning_rate": rate})
            trainer, began = make(chosen, train_on[: setting.num_latents]), time.perf_counter()
            alive = train(trainer, train_on, chosen, epochs)
            seconds = time.perf_counter() - began
            found = measure(trainer, test_on, *back)
            fvu, other = found.pop("fvu"), found.pop("fvu_rescaled")
            units = {"fvu_standardised": fvu, "fvu_raw": other} if standardised else {"fvu_raw": fvu, "fvu_standardised": other}
            row = {"trainer": name, "learning_rate": rate or "own", **units, **found}
            rows.append({**row, "dead_share": 1 - float(alive.float().mean()), "seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--activations", required=True)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--num-latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--units", choices=["standardised", "raw", "both"], default="both")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3], help="of the peers, beside their own")
    parser.add_argument("--trainers", nargs="+", default=["ours", "saelens", "dictionary_learning", "sparsify"])
    arguments = parser.parse_args()
    rates = [None, *arguments.rates]
    data, held_out = split(arguments.activations, arguments.layer, arguments.tokens)
    setting = Setting(
        width=data.shape[1],
        num_latents=arguments.num_latents,
        k=arguments.k,
        batch=arguments.batch,
        steps=arguments.epochs * (len(data) // arguments.batch),
        dead_after=100_000,
    )
    result: dict[str, Any] = {"setting": vars(setting), "tokens": len(data), "held_out": len(held_out)}
    for units in ("standardised", "raw"):
        if arguments.units in (units, "both"):
            result[units] = compare(data, held_out, setting, arguments.epochs, units == "raw", rates, arguments.trainers)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
