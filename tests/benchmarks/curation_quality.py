"""Ranking quality of curation against what else there is, on one sample of the corpus. Prints JSON.

    python tests/benchmarks/curation_quality.py --corpus '../shared/data/corpus/*.parquet' --seeds ../shared/data/seeds \
        --work WORK [--minilm DIRECTORY]

Documents drawn at random (seed 0, not stratified), their first --max-tokens tokens; ten seeds a domain. Average precision by the
corpus's `domain` labels, precision at R (R the documents of the domain) and at 100, and the share of each source of the domain
among the first R. Rankings: TF-IDF and BM25 of words, MiniLM (DIRECTORY holds its Hugging Face files), z-scored means of the raw
activations (these two under `balanced` too), and `finescope.curation` itself on dictionaries trained by `finescope.sae` at the
recipe's defaults, under every weighting and similarity, and for several `keep_latents`. Activations, the dear part, are kept in
WORK by chunks of documents: a run that is killed goes on with the next chunk. The means so far go to standard error.
"""

import argparse
import glob
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from activations import extract_texts, reference, seed_texts
from sae_selection import DOMAINS, average_precision, first_batches, train

from finescope.config import ScoreSection
from finescope.config_sae import SaeSection
from finescope.curation.codes import Codes, CorpusStatistics
from finescope.curation.contrast import drawn
from finescope.curation.score import Scorer, Similarity, Weighting, balanced
from finescope.models.hooks import HookPoint
from finescope.models.load import ModelReference, load_model
from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.coordinates import choose_coordinates

CHUNK = 250  # documents
SIMILARITIES: tuple[Similarity, ...] = ("balanced", "max", "mean", "softmax")
WEIGHTINGS: tuple[Weighting, ...] = ("none", "idf", "centred", "decoded", "contrast")
DENSE = ("max", "mean", "balanced")  # similarities of the baselines
KEEP = (16, 32, 64, 128, 256, 4096)
_K1, _B = 1.2, 0.75  # BM25


class Sample(NamedTuple):
    """Documents, and ten seeds of each domain."""

    texts: list[str]
    labels: np.ndarray  # str [N]
    sources: np.ndarray  # str [N]
    seeds: list[str]  # domain by domain, ten each


class Pooled(NamedTuple):
    """A vector of each document and of each seed."""

    documents: np.ndarray
    seeds: np.ndarray


def read_sample(corpus: str, seeds: str, documents: int) -> Sample:
    """Draw the documents, without replacement, in the order of the files."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(glob.glob(corpus))])
    chosen = table.take(np.sort(np.random.default_rng(0).choice(table.num_rows, documents, replace=False)))
    columns = [chosen.column(name).to_pylist() for name in ("instruction", "input", "output")]
    of_seeds = [text for domain in DOMAINS for text in seed_texts(f"{seeds}/{domain}.jsonl")]
    texts = ["\n".join(parts) for parts in zip(*columns, strict=True)]
    labels, sources = (np.array(chosen.column(name).to_pylist()) for name in ("domain", "source"))
    return Sample(texts, labels, sources, of_seeds)


def judged(score: Callable[[int], np.ndarray], sample: Sample, by_source: bool = False) -> dict[str, Any]:
    """The figures of a ranking; `score` gives the scores of domain number i."""
    found: dict[str, dict[str, float]] = {}
    sources: dict[str, float] = {}
    for number, domain in enumerate(DOMAINS):
        values, relevant = score(number), sample.labels == domain
        order = np.argsort(-values, kind="stable")
        first = order[: relevant.sum()]
        precision = {"p_at_r": float(relevant[first].mean()), "p_at_100": float(relevant[order[:100]].mean())}
        found[domain] = {"ap": average_precision(values, relevant), **precision}
        for source in np.unique(sample.sources[relevant]):
            sources[str(source)] = float(np.isin(np.flatnonzero(sample.sources == source), first).mean())
    means = {name: float(np.mean([row[name] for row in found.values()])) for name in ("ap", "p_at_r", "p_at_100")}
    return {"mean": means, "domains": found, **({"recall_at_r_by_source": sources} if by_source else {})}


def cosines(pooled: Pooled) -> Callable[[str], Callable[[int], np.ndarray]]:
    """Scores of dense vectors: max or mean over the seeds, or `balanced`."""
    units = [vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) for vectors in pooled]

    def similarity(kind: str) -> Callable[[int], np.ndarray]:
        def score(number: int) -> np.ndarray:
            seeds = units[1][10 * number : 10 * number + 10]
            if kind == "balanced":
                return units[0] @ balanced(seeds.astype(np.float64))
            return getattr(units[0] @ seeds.T, kind)(axis=1)

        return score

    return similarity


def words(sample: Sample) -> tuple[Codes, Codes]:
    """Counts of words as codes: documents, seeds."""
    vocabulary: dict[str, int] = {}
    rows = []
    for text in (*sample.texts, *sample.seeds):
        counts: dict[int, int] = {}
        for word in re.findall(r"\w+", text.lower()):
            place = vocabulary.setdefault(word, len(vocabulary))
            counts[place] = counts.get(place, 0) + 1
        rows.append(sorted(counts.items()))

    def codes(part: list[list[tuple[int, int]]]) -> Codes:
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in part])])
        entries = np.array([entry for row in part for entry in row])
        return Codes(offsets, entries[:, 0].astype(np.int32), entries[:, 1].astype(np.float32), len(vocabulary))

    return codes(rows[: len(sample.texts)]), codes(rows[len(sample.texts) :])


def lexical(sample: Sample) -> dict[str, Any]:
    """TF-IDF (logarithmic counts, cosine) and BM25 with each seed as a query; the better of max and mean over the seeds."""
    documents, seeds = words(sample)
    statistics = CorpusStatistics.of(documents)
    logs = [codes.with_values(1 + np.log(codes.values)) for codes in (documents, seeds)]
    lengths = documents.sum_rows(documents.values)
    share = _K1 * (1 - _B + _B * np.repeat(lengths / lengths.mean(), np.diff(documents.offsets)))
    saturated = documents.values * (_K1 + 1) / (documents.values + share)
    idf = np.log(1 + (len(documents) - statistics.active + 0.5) / (statistics.active + 0.5))
    queries = (seeds.dense() * idf).T
    bm25 = documents.sum_rows(queries[documents.ids] * saturated[:, None])
    found: dict[str, Any] = {}
    for kind in ("max", "mean"):
        similarity: Similarity = "max" if kind == "max" else "mean"
        scorers = [
            Scorer(rows_of(logs[1], n), CorpusStatistics.of(logs[0]), similarity, "idf", 1.0, None, None) for n in range(4)
        ]
        found[f"tf_idf/{kind}"] = judged(lambda n, scorers=scorers: scorers[n](logs[0]).score, sample)
        found[f"bm25/{kind}"] = judged(lambda n, kind=kind: getattr(bm25[:, 10 * n : 10 * n + 10], kind)(axis=1), sample)
    return found


def rows_of(seeds: Codes, number: int) -> Codes:
    """The codes of one domain's ten seeds."""
    return list(seeds.slices(10))[number]


@torch.no_grad()
def minilm(directory: str, sample: Sample) -> Pooled:
    """Mean of the last layer over 128 tokens, as the model's card does it."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    texts = [*sample.texts, *sample.seeds]
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(texts), 64):
        places = order[start : start + 64]
        batch = [texts[place] for place in places]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        vectors[places] = ((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)).numpy()
    return Pooled(vectors[: len(sample.texts)], vectors[len(sample.texts) :])


def activations(work: Path, model: ModelReference, sample: Sample, layer: int, max_tokens: int) -> tuple[list[Path], Path]:
    """Files of a chunk each, and of the seeds: `values` float16 [tokens, d], `document` int32 [tokens], `count` of documents."""
    parts = {f"part-{start:06d}": sample.texts[start : start + CHUNK] for start in range(0, len(sample.texts), CHUNK)}
    for name, texts in {"seeds": sample.seeds, **parts}.items():
        path = work / f"{name}.npz"
        if not path.exists():
            found = extract_texts(model, texts, [layer], max_tokens)
            values = found[f"layer_{layer}"]
            assert np.abs(values).max() < np.finfo(np.float16).max
            unfinished = work / f"{name}.unfinished.npz"
            np.savez(unfinished, values=values.astype(np.float16), document=found["document"], count=len(texts))
            unfinished.rename(path)
    return [work / f"{name}.npz" for name in parts], work / "seeds.npz"


def pooled_by(path: Path, encode: Callable[[np.ndarray], np.ndarray], width: int) -> np.ndarray:
    """Mean over each document's tokens of what `encode` makes of activations; float32 [documents, width]."""
    arrays = np.load(path)
    values, document = arrays["values"], arrays["document"]
    count = int(arrays["count"])
    sums = np.zeros((count, width), np.float32)
    for start in range(0, len(values), 4096):
        span = slice(start, start + 4096)
        np.add.at(sums, document[span], encode(values[span].astype(np.float32)))
    return sums / np.maximum(np.bincount(document, minlength=count), 1)[:, None]


def kept(pooled: np.ndarray, keep: int) -> Codes:
    """Codes as `embed` stores them: the `keep` largest latents, in half precision."""
    values = np.sort(pooled, axis=1)[:, ::-1][:, min(keep, pooled.shape[1]) - 1][:, None]
    matrix = np.where(pooled >= np.maximum(values, 1e-7), pooled, 0).astype(np.float16)
    rows, ids = np.nonzero(matrix)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return Codes(offsets, ids.astype(np.int32), matrix[rows, ids].astype(np.float32), matrix.shape[1])


def scores(
    codes: Pooled, decoder: np.ndarray, keep: int, similarity: Similarity, weighting: Weighting, sample: Sample, **of: bool
) -> dict[str, Any]:
    """`finescope.curation` on pooled codes of the dictionary with this decoder [num_latents, C]."""
    documents, seeds = kept(codes.documents, keep), kept(codes.seeds, keep)
    chosen = np.flatnonzero(drawn([str(number) for number in range(len(documents))], len(documents)))
    background = Codes.concatenated([list(documents.slices(1))[place] for place in chosen]) if weighting == "contrast" else None
    temperature = ScoreSection().temperature
    statistics = CorpusStatistics.of(documents)
    settings = (statistics, similarity, weighting, temperature, background, decoder if weighting == "decoded" else None)
    scorers = [Scorer(rows_of(seeds, n), *settings) for n in range(4)]
    found = judged(lambda number: scorers[number](documents).score, sample, **of)
    # Stored: an id of 4 bytes and a value of 2 a latent, before compression.
    return {"bytes_a_document": 6 * len(documents.ids) / len(documents), **found}


def dictionary(method: str, parts: list[Path], network: Any, sample: list[Any], layer: int) -> SparseAutoencoder:
    """A dictionary at the recipe's defaults on all activations, once over, mixed."""
    section = SaeSection.model_validate({"coordinates": {"method": method}, "layer": layer})
    chosen = choose_coordinates(network, sample, HookPoint(layer), section.coordinates, 0)
    data = np.concatenate([np.load(path)["values"] for path in parts])
    mixed = data[np.random.default_rng(0).permutation(len(data))].astype(np.float32)
    section = section.model_copy(update={"num_tokens": min(len(mixed), section.num_tokens)})
    return train(mixed, chosen, section, data.shape[1])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--seeds", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--minilm", default=None)
    parser.add_argument("--documents", type=int, default=12_000)
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--coordinates", nargs="+", default=["all", "jacobian", "random"])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    sample = read_sample(arguments.corpus, arguments.seeds, arguments.documents)
    found: dict[str, dict[str, Any]] = lexical(sample)
    if arguments.minilm:
        vectors = minilm(arguments.minilm, sample)
        found |= {f"minilm/{kind}": judged(cosines(vectors)(kind), sample) for kind in DENSE}
    with tempfile.TemporaryDirectory() as folder:
        model = reference(folder)
        parts, seeds = activations(arguments.work, model, sample, arguments.layer, arguments.max_tokens)

        def pool(encode: Callable[[np.ndarray], np.ndarray], width: int) -> Pooled:
            return Pooled(np.concatenate([pooled_by(path, encode, width) for path in parts]), pooled_by(seeds, encode, width))

        raw = pool(lambda values: values, np.load(seeds)["values"].shape[1])
        mean, deviation = raw.documents.mean(axis=0), raw.documents.std(axis=0)
        standard = Pooled(*((vectors - mean) / deviation for vectors in raw))
        found |= {f"raw_z/{kind}": judged(cosines(standard)(kind), sample) for kind in DENSE}
        network = load_model(model, num_layers=arguments.layer)
        first = first_batches(model, sample.texts[:32], arguments.max_tokens)
        for method in arguments.coordinates:
            autoencoder = dictionary(method, parts, network, first, arguments.layer)
            with torch.no_grad():
                decoder = autoencoder.standardised_decoder().numpy()
                codes = pool(lambda v, a=autoencoder: a.encode(torch.from_numpy(v)).numpy(), autoencoder.num_latents)
            for weighting in WEIGHTINGS:
                for similarity in SIMILARITIES if weighting != "contrast" else SIMILARITIES[:1]:
                    found[f"{method}/{similarity}/{weighting}"] = scores(codes, decoder, 128, similarity, weighting, sample)
            default = ScoreSection()
            for keep in KEEP:
                figures = scores(codes, decoder, keep, default.similarity, default.weighting, sample, by_source=keep == 128)
                found[f"{method}/default/keep_{keep}"] = figures
            print({name: row["mean"] for name, row in found.items()}, file=sys.stderr, flush=True)
    print(json.dumps({"documents": len(sample.texts), "max_tokens": arguments.max_tokens, "rankings": found}))


if __name__ == "__main__":
    main()
