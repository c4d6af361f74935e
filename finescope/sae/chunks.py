"""The corpus as chunks of documents: which a dictionary is trained on, in which order, and their tokens in batches."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from finescope.config import CorpusSection
from finescope.corpus.documents import read_documents
from finescope.corpus.tokenise import CPU_BATCH_TOKENS, length_batches, pad_batch, tokenise
from finescope.models.load import ModelReference, default_device, load_tokenizer
from finescope.sae.stream import TokenBatch

# Documents of a chunk: enough to sort by length, few enough that a chunk's activations fit in memory many times.
CHUNK_DOCUMENTS = 256
# A small corpus is cut into so many chunks at least, so that some of them can be held out.
_LEAST_CHUNKS = 20
# Of a forward pass on a GPU, padding included.
_GPU_BATCH_TOKENS = 4096
# Of text of units that were read and may be asked for again.
_KEPT_CHARACTERS = 2**28

Chunk = dict[str, Any]  # a unit (see stages.references.limited_units) with `first` and `count`, of its documents


def plan_chunks(units: Sequence[dict[str, Any]], seed: int, most: int | None = None) -> list[Chunk]:
    """The documents of `units` as chunks, in an order drawn from the seed that takes one chunk of every unit in turn.

    `most`: chunks of so many documents are enough; None: all of them. A corpus of 10^9 documents has millions of chunks.

    A training that needs few tokens of a large corpus so sees a little of every file. Chunks are cut by rows that may be
    rejected when they are read, so that some are smaller.
    """
    documents = sum(unit["take"] for unit in units)
    size = max(1, min(CHUNK_DOCUMENTS, documents // _LEAST_CHUNKS))
    random = np.random.default_rng(seed)
    firsts = [random.permutation(np.arange(0, unit["take"], size)) for unit in units]
    chunks: list[Chunk] = []
    planned = 0
    for turn in range(max(map(len, firsts), default=0)):
        for number in random.permutation(len(units)):
            if turn < len(firsts[number]):
                first = int(firsts[number][turn])
                chunks.append({**units[number], "first": first, "count": size})
                planned += min(size, units[number]["take"] - first)  # the last chunk of a unit is seldom full
                if most is not None and planned >= most:
                    return chunks
    return chunks


class ChunkReader:
    """Reads chunks; the texts of a unit are kept for its other chunks, as far as memory is meant for that."""

    def __init__(self, model: ModelReference, corpus: CorpusSection, max_tokens: int) -> None:
        self._tokenizer = load_tokenizer(model)
        self._corpus, self._max_tokens = corpus, max_tokens
        self._texts: OrderedDict[int, list[str]] = OrderedDict()

    def batches(self, chunk: Chunk) -> Iterator[TokenBatch]:
        """The chunk's tokens, documents of like length together, padded on the right."""
        texts = self._of_unit(chunk)[chunk["first"] : chunk["first"] + chunk["count"]]
        tokens = tokenise(self._tokenizer, texts, self._max_tokens)
        most = CPU_BATCH_TOKENS if default_device().type == "cpu" else _GPU_BATCH_TOKENS
        for places in length_batches([len(item) for item in tokens], most):
            yield pad_batch([tokens[place] for place in places], self._tokenizer.pad_token_id)

    def _of_unit(self, unit: Chunk) -> list[str]:
        number = unit["unit"]
        if number not in self._texts:
            read = read_documents(unit, self._corpus, unit["name"], self._tokenizer, unit["take"], "sae")
            self._texts[number] = read.table.column("text").to_pylist()
            while len(self._texts) > 1 and sum(len(text) for texts in self._texts.values() for text in texts) > _KEPT_CHARACTERS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(number)
        return self._texts[number]
