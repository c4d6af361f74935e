"""Extraction: chunks of documents to the activations that dictionaries are trained on, one array a chunk."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from finescope import storage
from finescope.config import CorpusSection
from finescope.models.hooks import HookPoint, capture
from finescope.models.load import ModelReference, load_model
from finescope.sae.autoencoder import select
from finescope.sae.chunks import Chunk, ChunkReader
from finescope.sae.stream import TokenBatch, used_positions

_COLUMN = "activations"


@dataclass(frozen=True)
class SiteColumns:
    """What is kept of the activations at one hook point. Goes to other processes."""

    hook: HookPoint
    d_in: int
    coordinates: np.ndarray  # [J] int64, sorted: of the d_in coordinates
    basis: np.ndarray | None  # [C, J] float32; None: the coordinates themselves, C = J

    @property
    def width(self) -> int:
        """C."""
        return len(self.coordinates if self.basis is None else self.basis)


@torch.no_grad()
def extract(model: PreTrainedModel, batches: Iterable[TokenBatch], sites: tuple[SiteColumns, ...]) -> Iterator[Tensor]:
    """Activations [n, sum of C] float32 of each batch's used positions, those of the sites side by side."""
    device = model.device
    chosen = [
        (torch.from_numpy(site.coordinates).to(device), None if site.basis is None else torch.from_numpy(site.basis).to(device))
        for site in sites
    ]
    hooks = [site.hook for site in sites]
    for input_ids, attention_mask in batches:
        mask = torch.from_numpy(attention_mask).to(device)
        if mask.shape[1] < 2:
            continue  # one token is position 0 alone
        values = capture(model, torch.from_numpy(input_ids).to(device), mask, hooks)
        used = used_positions(mask)
        yield torch.cat([select(value[used], *site) for value, site in zip(values, chosen, strict=True)], dim=1)


class Extractor:
    """The table worker of extraction: a row of `units` is a chunk, the result a table of its activations.

    The model is loaded when the first chunk comes, up to the deepest hook point.
    """

    def __init__(
        self,
        model: ModelReference,
        corpus: CorpusSection,
        max_tokens: int,
        sites: tuple[SiteColumns, ...],
        cache: str | None,
    ) -> None:
        """`cache`: URI of a directory where the activations of each chunk are kept and looked for; None: nowhere."""
        self._reference, self._corpus, self._max_tokens = model, corpus, max_tokens
        self._sites, self._cache = sites, cache
        self._loaded: tuple[PreTrainedModel, ChunkReader] | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One chunk to a table [n] of one column, a list of float32 each."""
        (chunk,) = batch.to_pylist()
        if self._cache is None:
            return self._extract(chunk)
        place = storage.join(self._cache, f"{chunk['unit']:06d}-{chunk['first']:09d}.parquet")
        if storage.exists(place):
            return storage.read_parquet(place)
        table = self._extract(chunk)
        storage.put_parquet(place, table)
        return table

    def _extract(self, chunk: Chunk) -> pa.Table:
        if self._loaded is None:
            deepest = max(site.hook.layer for site in self._sites)
            reader = ChunkReader(self._reference, self._corpus, self._max_tokens)
            self._loaded = load_model(self._reference, num_layers=deepest), reader
        model, reader = self._loaded
        width = sum(site.width for site in self._sites)
        parts = [part.cpu() for part in extract(model, reader.batches(chunk), self._sites)]
        values = torch.cat(parts) if parts else torch.empty(0, width)
        return pa.table({_COLUMN: pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().ravel()), width)})


def activations_of(table: pa.Table) -> np.ndarray:
    """The array [n, C] float32 in a table of `Extractor`, without a copy where it is in one piece."""
    column = table.column(_COLUMN).combine_chunks()
    values = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column.chunk(0).flatten()
    return values.to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
