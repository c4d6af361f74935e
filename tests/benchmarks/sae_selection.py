"""Ranking quality of dictionaries on 128 coordinates chosen by each method, against all coordinates. Prints JSON.

    python tests/benchmarks/sae_selection.py --activations activations.npz --corpus '../shared/data/corpus/*.parquet' \
        --seeds ../shared/data/seeds

The paper's Table 6 at our scale: average precision by the corpus's labels of the ranking by the seeds, for mathematics, code,
medicine and law. The activations are those of `activations.py`, whose --documents must be given again. Times: `select_s` is
the choice of coordinates on 32 documents, `fit_s` the training.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from activations import extract_texts, read, reference, seed_texts

from finescope.config import SaeSection
from finescope.corpus.tokenise import length_batches, pad_batch, tokenise
from finescope.curation.codes import Codes, CorpusStatistics
from finescope.curation.score import Scorer
from finescope.models.hooks import HookPoint
from finescope.models.load import ModelReference, load_model, load_tokenizer
from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.coordinates import Coordinates, choose_coordinates
from finescope.sae.fit import FitPlan, FitResult, fit
from finescope.sae.stream import TokenBatch

DOMAINS = ("math", "code", "medicine", "law")
METHODS = ("jacobian", "magnitude", "variance", "pca", "random", "all")
KEPT = 128  # latents of a pooled code


def average_precision(score: np.ndarray, relevant: np.ndarray) -> float:
    """Mean of the precision at each relevant document of the ranking by falling score, ties by position."""
    hits = relevant[np.argsort(-score, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


@torch.no_grad()
def pooled(autoencoder: SparseAutoencoder, activations: np.ndarray, document: np.ndarray, documents: int) -> Codes:
    """Mean code of each document, its `KEPT` largest latents."""
    sums = torch.zeros(documents, autoencoder.num_latents)
    owner = torch.from_numpy(document).long()
    for start in range(0, len(document), 8192):
        code = autoencoder.encode_sparse(torch.from_numpy(activations[start : start + 8192]))
        place = owner[start : start + 8192, None] * autoencoder.num_latents + code.ids
        sums.view(-1).scatter_add_(0, place.flatten(), code.values.flatten())
    sums /= torch.bincount(owner, minlength=documents).clamp(min=1)[:, None]
    values, ids = sums.topk(KEPT, dim=1)
    order = ids.sort(dim=1)
    values = values.gather(1, order.indices)
    offsets = np.arange(0, documents * KEPT + 1, KEPT)
    flat = order.values.numpy().astype(np.int32).ravel()
    return Codes(offsets, flat, values.numpy().ravel(), autoencoder.num_latents)


def ranked(corpus: Codes, seeds: dict[str, Codes], labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Average precision by domain under the paper's score and under ours."""
    statistics = CorpusStatistics.of(corpus)
    scores: dict[str, tuple[Literal["max", "mean"], Literal["none", "centred"]]] = {
        "max_none": ("max", "none"),
        "max_centred": ("max", "centred"),
        "mean_centred": ("mean", "centred"),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (similarity, weighting) in scores.items():
        by_domain = {
            domain: average_precision(
                Scorer(codes, statistics, similarity, weighting, 0.1, *2 * [None])(corpus).score, labels == domain
            )
            for domain, codes in seeds.items()
        }
        found[name] = {**by_domain, "mean": float(np.mean(list(by_domain.values())))}
    return found


def train(data: np.ndarray, chosen: Coordinates, section: SaeSection, width: int) -> tuple[SparseAutoencoder, FitResult]:
    """A dictionary on all activations (the first chunk held out), as one on whole activations."""
    seen = data[:, chosen.indices.numpy()]
    if chosen.basis is not None:
        seen = seen @ chosen.basis.numpy().T
    chunks = np.array_split(seen, 40)
    plan = FitPlan((section,), ((0, seen.shape[1]),), len(chunks), 1, None)
    (result,) = fit(plan, lambda a, b, c: (chunks[n] for n in range(a, b, c)), torch.device("cpu"), lambda _: None)
    weights = {**result.autoencoder.state_dict(), "coordinates": chosen.indices}
    if chosen.basis is not None:
        weights["basis"] = chosen.basis
    return SparseAutoencoder(weights, architecture="topk", k=section.k, d_in=width), result


def first_batches(model: ModelReference, texts: list[str], max_tokens: int) -> list[TokenBatch]:
    """The documents on which coordinates are chosen."""
    tokenizer = load_tokenizer(model)
    tokens = tokenise(tokenizer, texts, max_tokens)
    batches = length_batches([len(item) for item in tokens], 1024)
    return [pad_batch([tokens[place] for place in batch], tokenizer.pad_token_id) for batch in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--activations", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--seeds", required=True)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    arrays = np.load(arguments.activations)
    data, document, labels = arrays[f"layer_{arguments.layer}"], arrays["document"], arrays["label"]
    texts, domains = read(arguments.corpus, arguments.documents, seed=0)
    assert domains == labels.tolist(), "give the --documents of activations.py"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = reference(folder)
        network = load_model(model, num_layers=arguments.layer)
        sample = first_batches(model, texts[:32], arguments.max_tokens)
        seeds = {}
        for domain in DOMAINS:
            lines = seed_texts(f"{arguments.seeds}/{domain}.jsonl")
            found = extract_texts(model, lines, [arguments.layer], arguments.max_tokens)
            seeds[domain] = (found[f"layer_{arguments.layer}"], found["document"])
        mixed = data[np.random.default_rng(0).permutation(len(data))]
        for method in arguments.methods:
            values: dict[str, Any] = {"coordinates": {"method": method, "count": arguments.count}, "num_tokens": len(data)}
            section = SaeSection.model_validate({**values, "epochs": arguments.epochs, "dead_after_tokens": 100_000})
            began = time.perf_counter()
            chosen = choose_coordinates(network, sample, HookPoint(arguments.layer), section.coordinates, 0)
            selected = time.perf_counter()
            autoencoder, result = train(mixed, chosen, section, data.shape[1])
            fitted = time.perf_counter()
            codes = pooled(autoencoder, data, document, len(labels))
            seed_codes = {
                domain: pooled(autoencoder, values, owner, int(owner.max()) + 1) for domain, (values, owner) in seeds.items()
            }
            figures = {"fvu": result.held_out.fvu, "dead_share": result.held_out.statistics.dead_share}
            times = {"select_s": selected - began, "fit_s": fitted - selected}
            rows.append({"method": method, **figures, **times, "average_precision": ranked(codes, seed_codes, labels)})
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"tokens": len(data), "documents": len(labels), "file": Path(arguments.activations).name, "rows": rows}))


if __name__ == "__main__":
    main()
