"""How many of the best documents pass the screen, against the share that it lets through. Prints JSON.

    python tests/benchmarks/screen.py --corpus '../shared/data/corpus/*.parquet' --seeds ../shared/data/seeds --work WORK

The documents, activations in WORK and dictionary are those of `curation_quality.py`; of WORK what is there is used. All
documents are scored by the recipe's defaults, which is the truth: the best M of each domain. The screen is fitted to a sample of
them as the step `screen` does it, with the statistics of the sample alone; its recall is of the best M among the documents that
are not in the sample. Once by share, once as `screen.recall` and `screen.top` choose it; and what share takes 99 % of the best
(`takes`), also with other weights of the ridge, with numbers as they are, and without the seeds. All of it again with the domain
thinned to one document in a hundred (`rare`). Then its rate (CPU time, one thread).
"""

import os

os.environ.setdefault("POLARS_MAX_THREADS", "1")

import argparse
import contextlib
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from activations import reference
from curation_quality import CHUNK, Sample, dictionary, kept, pooled_by, read_sample, rows_of
from sae_selection import DOMAINS, first_batches

from finescope.config import EmbedSection, ScoreSection
from finescope.config_screen import ScreenSection
from finescope.curation import ngrams
from finescope.curation import screen as screen_module
from finescope.curation.codes import Codes, CorpusStatistics
from finescope.curation.ngrams import hashed_ngrams
from finescope.curation.score import Scorer
from finescope.curation.screen import Cut, Screen, cut_of, foretell
from finescope.models.load import load_model

SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
BEST = (0.005, 0.01, 0.02, 0.05)  # of the documents that are not in the sample
RARE = 0.01
CHARACTERS = 5  # a token, as stages/screen.py reads
VARIANTS = {
    **{f"ridge {value:g}": mock.patch.object(screen_module, "_RIDGE", value) for value in (0.1, 0.3, 1.0, 10.0)},
    "numbers as they are": mock.patch.object(ngrams, "_DIGITS", re.compile(r"(?!)")),
    "without seeds": contextlib.nullcontext(),
}


class Case(NamedTuple):
    """One domain's documents and seeds."""

    documents: Codes
    texts: list[str]
    seeds: Codes
    seed_texts: list[str]
    decoder: np.ndarray  # float32 [num_latents, C]


def taken(case: Case, places: np.ndarray) -> Case:
    """Some of the documents."""
    rows = list(case.documents.slices(1))
    return case._replace(
        documents=Codes.concatenated([rows[place] for place in places]), texts=[case.texts[place] for place in places]
    )


def rare(case: Case, of_domain: np.ndarray) -> Case:
    """So many documents of the domain that they are `RARE` of all, drawn at random, and all others."""
    others = np.flatnonzero(~of_domain)
    count = round(RARE * len(others) / (1 - RARE))
    left = np.random.default_rng(1).choice(np.flatnonzero(of_domain), count, replace=False)
    return taken(case, np.sort(np.concatenate([others, left])))


def scores(case: Case, codes: Codes, statistics: CorpusStatistics) -> np.ndarray:
    """By the recipe's default."""
    section = ScoreSection()
    settings = (section.similarity, section.weighting, section.temperature)
    return Scorer(case.seeds, statistics, *settings, None, case.decoder)(codes).score


def judged(case: Case, sample: int, max_tokens: int, with_seeds: bool = True) -> dict[str, Any]:
    """Fit to a sample of the documents and measure on the others."""
    characters = CHARACTERS * max_tokens
    drawn = np.sort(np.random.default_rng(0).choice(len(case.texts), sample, replace=False))
    of_sample, new = taken(case, drawn), np.setdiff1d(np.arange(len(case.texts)), drawn)
    statistics = CorpusStatistics.of(of_sample.documents)
    known = scores(case, of_sample.documents, statistics)
    examples = case.seed_texts if with_seeds else []
    targets = scores(case, case.seeds, statistics)[: len(examples)]
    grams = [hashed_ngrams(texts, characters) for texts in (of_sample.texts, examples)]
    fitted = foretell(grams[0], known, grams[1], targets, 0)
    screen = Screen(fitted.weights.astype(np.float32)[None], np.array([fitted.bias]), np.zeros(1), characters)
    said = screen.margins([case.texts[place] for place in new])
    return recalls(
        scores(case, case.documents, CorpusStatistics.of(case.documents))[new],
        said,
        cut_of(fitted.scores, known, ScreenSection()),
    )


def share_for(place: np.ndarray, rows: np.ndarray) -> float:
    """The least share of all documents, by their `place` in the order of the screen, that holds 99 % of some `rows`."""
    return float((np.sort(place[rows])[-1 - len(rows) // 100] + 1) / len(place))


def recalls(truth: np.ndarray, said: np.ndarray, chosen: Cut) -> dict[str, Any]:
    """Of documents that the screen has not seen: recall of the best by share, and with the chosen cut."""
    order, by_share = np.argsort(-truth, kind="stable"), np.argsort(-said, kind="stable")
    place = np.empty(len(said), int)
    place[by_share] = np.arange(len(said))
    best = {f"{most:g}": order[: max(1, round(most * len(said)))] for most in BEST}
    passed = said >= np.float32(chosen.value)
    return {
        "correlation": float(np.corrcoef(said, truth)[0, 1]),
        "takes": {name: share_for(place, rows) for name, rows in best.items()},
        "by_share": {
            f"{share:g}": {name: float((place[rows] < share * len(said)).mean()) for name, rows in best.items()}
            for share in SHARES
        },
        "chosen": {
            **{name: value for name, value in chosen._asdict().items() if name != "value"},
            "passed": float(passed.mean()),
            "recalls": {name: float(passed[rows].mean()) for name, rows in best.items()},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--seeds", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--documents", type=int, default=12_000)
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--coordinates", default="all")
    parser.add_argument("--sample", type=int, default=ScreenSection().sample)
    arguments = parser.parse_args()
    sample, most = read_sample(arguments.corpus, arguments.seeds, arguments.documents), arguments.max_tokens
    with tempfile.TemporaryDirectory() as folder:
        parts, seeds_file, sample = there(arguments.work, sample)
        model = reference(folder)
        network = load_model(model, num_layers=arguments.layer)
        first = first_batches(model, sample.texts[:32], most)
        autoencoder = dictionary(arguments.coordinates, parts, network, first, arguments.layer)
    with torch.no_grad():
        paths = [*parts, seeds_file]
        pools = [
            pooled_by(path, lambda v: autoencoder.encode(torch.from_numpy(v)).numpy(), autoencoder.num_latents) for path in paths
        ]
    documents, seeds = (kept(values, EmbedSection().keep_latents) for values in (np.concatenate(pools[:-1]), pools[-1]))
    print(json.dumps(compared(documents, seeds, autoencoder.standardised_decoder().numpy(), sample, arguments.sample, most)))


def compared(documents: Codes, seeds: Codes, decoder: np.ndarray, sample: Sample, count: int, max_tokens: int) -> dict[str, Any]:
    """All figures."""
    cases = [
        Case(documents, sample.texts, rows_of(seeds, number), sample.seeds[10 * number : 10 * number + 10], decoder)
        for number in range(len(DOMAINS))
    ]
    began = time.process_time()
    found: dict[str, Any] = {"documents": len(documents), "sample": count}
    found["domains"] = {domain: judged(case, count, max_tokens) for domain, case in zip(DOMAINS, cases, strict=True)}
    thinned = {domain: rare(case, sample.labels == domain) for domain, case in zip(DOMAINS, cases, strict=True)}
    found["rare"] = {domain: judged(case, count, max_tokens) for domain, case in thinned.items()}
    found["variants"] = {}
    for name, patched in VARIANTS.items():
        with patched:
            for kind, chosen in (("", cases), ("rare, ", thinned.values())):
                rows = [judged(case, count, max_tokens, name != "without seeds") for case in chosen]
                takes = {most: float(np.mean([row["takes"][most] for row in rows])) for most in rows[0]["takes"]}
                found["variants"][kind + name] = {"correlation": float(np.mean([row["correlation"] for row in rows])), **takes}
    found["in_all_s"] = time.process_time() - began
    model = Screen(np.zeros((len(DOMAINS), ngrams.BUCKETS), np.float32), np.zeros(4), np.zeros(4), CHARACTERS * max_tokens)
    began = time.process_time()
    model.margins(sample.texts)
    seconds = time.process_time() - began
    read = sum(min(len(text), CHARACTERS * max_tokens) for text in sample.texts)
    return {**found, "documents_s": len(sample.texts) / seconds, "megabytes_s": read / seconds / 1e6}


def there(work: Path, sample: Sample) -> tuple[list[Path], Path, Sample]:
    """The chunks of activations that are there, from the first on, the seeds', and the documents that they are of."""
    chunks = sorted(work.glob("part-??????.npz"))
    count = sum(int(np.load(path)["count"]) for path in chunks)
    assert [path.stem for path in chunks] == [f"part-{CHUNK * at:06d}" for at in range(len(chunks))], (
        "no chunk is missing between"
    )
    seeds = work / "seeds.npz"
    assert seeds.exists(), "curation_quality.py has begun"
    return chunks, seeds, Sample(sample.texts[:count], sample.labels[:count], sample.sources[:count], sample.seeds)


if __name__ == "__main__":
    main()
