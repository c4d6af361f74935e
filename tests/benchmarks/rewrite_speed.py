"""Speed of the rewriter's generation against `generate` of transformers. Prints JSON.

    OMP_NUM_THREADS=1 python tests/benchmarks/rewrite_speed.py --corpus '../shared/data/corpus/*.parquet'

SmolLM2-135M is asked to rewrite rows of a corpus. Both get the same prompts in the same batches, left-padded, with a key/value
cache, the same budget for all rows of a batch, and take the most likely token. They take turns. A ratio is our tokens a second
over theirs, by the median of the rounds, once by the clock and once by CPU time, which on one thread is blind to what else the
machine does; the bar is 0.95. `same_texts` is the share of rows for which both wrote the same, which only rounding keeps below 1.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from activations import reference
from answer_checks import documents
from transformers import PreTrainedModel

from finescope.distillation.generate import Generated, Prompt, generate
from finescope.distillation.rewrite import Rewriter
from finescope.distillation.token_writer import TokenWriter
from finescope.models.load import load_model, load_tokenizer

Texts = list[list[int]]


class Asked:
    """A generator that notes what it is asked and writes nothing."""

    context = 2**31

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    def __call__(self, prompts: Sequence[Prompt], progress: Callable[[int], Any]) -> list[Generated]:
        self.prompts.extend(prompts)
        return [Generated([], True) for _ in prompts]


def batches(tokenizer: Any, corpus: str, rows: int, batch: int, budget: int) -> list[list[Prompt]]:
    """What the rewriter asks about `rows` rows, longest first, `batch` at a time."""
    given, _ = documents(corpus, rows, seed=0)
    asked = Asked()
    Rewriter(lambda: TokenWriter(asked, tokenizer, 0), tokenizer, 256)(given, lambda _: None)
    prompts = [Prompt(prompt.tokens, budget, 0) for prompt in sorted(asked.prompts, key=lambda prompt: -len(prompt.tokens))]
    return [prompts[begin : begin + batch] for begin in range(0, len(prompts), batch)]


def ours(model: PreTrainedModel, batch: list[Prompt], ends: frozenset[int]) -> Texts:
    """By `finescope.distillation.generate`."""
    return [one.tokens for one in generate(model, batch, ends, 0.0, 2**31, lambda _: None)]


@torch.inference_mode()
def theirs(model: PreTrainedModel, batch: list[Prompt], ends: frozenset[int]) -> Texts:
    """By `generate` of transformers."""
    longest, budget = max(len(prompt.tokens) for prompt in batch), batch[0].budget
    tokens = torch.tensor([[0] * (longest - len(prompt.tokens)) + prompt.tokens for prompt in batch])
    mask = torch.tensor([[0] * (longest - len(prompt.tokens)) + [1] * len(prompt.tokens) for prompt in batch])
    stop = sorted(ends)
    made: Any = model.generate(  # type: ignore[operator]
        input_ids=tokens, attention_mask=mask, max_new_tokens=budget, do_sample=False, eos_token_id=stop, pad_token_id=stop[0]
    )
    rows = made[:, longest:].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = reference(folder)
        tokenizer, model = load_tokenizer(place), load_model(place)
    ends = frozenset([tokenizer.eos_token_id])
    work = batches(tokenizer, arguments.corpus, arguments.rows, arguments.batch, arguments.budget)
    ways = {"ours": ours, "theirs": theirs}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    texts: dict[str, Texts] = {}
    for name, way in ways.items():  # warms up
        texts[name] = [row for batch in work for row in way(model, batch, ends)]
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            clock, cpu = time.perf_counter(), time.process_time()
            for batch in work:
                way(model, batch, ends)
            seconds[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    written = {name: sum(len(row) + 1 for row in rows) for name, rows in texts.items()}
    rates = {
        name: [written[name] / statistics.median(round[kind] for round in rounds) for kind in (0, 1)]
        for name, rounds in seconds.items()
    }
    print(
        json.dumps(
            {
                "tokens": written,
                "same_texts": statistics.mean(one == other for one, other in zip(*texts.values(), strict=True)),
                "tokens_per_second": {name: rate[0] for name, rate in rates.items()},
                "tokens_per_cpu_second": {name: rate[1] for name, rate in rates.items()},
                "ratio_clock": rates["ours"][0] / rates["theirs"][0],
                "ratio_cpu": rates["ours"][1] / rates["theirs"][1],
                "rows": sum(map(len, work)),
                "device": f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
