"""Coordinates of each hook point, chosen on the step's first documents: summed on as many actors as there are."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from safetensors.torch import load, save

from finescope import storage
from finescope.config import CorpusSection, SaeSection
from finescope.models.hooks import HookPoint, hook_width
from finescope.models.load import ModelReference, load_meta_model, load_model
from finescope.runners.base import Context, Resources
from finescope.sae.chunks import Chunk, ChunkReader
from finescope.sae.coordinates import Coordinates, CoordinateScorer, Sums, coordinates_of, merge
from finescope.sae.extract import SiteColumns
from finescope.stages.references import memory_bytes

# Documents that are summed together: one worker's share at a time.
_PART_DOCUMENTS = 8


class _Score:
    """The table worker that sums one part of the reference sample at one hook point after the other."""

    def __init__(self, model: ModelReference, corpus: CorpusSection, section: SaeSection, hooks: tuple[HookPoint, ...]) -> None:
        self._reader = ChunkReader(model, corpus, section.max_tokens)
        network = load_model(model, num_layers=max(hook.layer for hook in hooks))
        chosen = section.coordinates
        assert chosen.method != "random"
        assert chosen.method != "all"
        self._scorers = [CoordinateScorer(network, hook, chosen.method, chosen.probes, section.seed) for hook in hooks]

    def __call__(self, batch: pa.Table) -> pa.Table:
        (part,) = batch.to_pylist()
        batches = list(self._reader.batches(part))
        sums = [scorer(batches, part["part"]).to_bytes() for scorer in self._scorers]
        return pa.table({"part": [part["part"]], "count": [part["count"]], "sums": pa.array([sums], pa.list_(pa.large_binary()))})


def choose(
    context: Context,
    model: ModelReference,
    corpus: CorpusSection,
    section: SaeSection,
    hooks: Sequence[HookPoint],
    chunks: Sequence[Chunk],
    uri: str,
) -> tuple[SiteColumns, ...]:
    """What is kept at each of `hooks`, by the first `coordinates.documents` documents of `chunks`.

    The choice is kept below `uri` as soon as it is made.

    Raises:
        ModelError: the model has no such hook point.
        StepFailed: too few activations, or some that are not finite.
    """
    meta = load_meta_model(model)
    widths = [hook_width(meta, hook) for hook in hooks]
    place = storage.join(uri, "coordinates.safetensors")
    if storage.exists(place):
        kept = load(storage.read_bytes(place))
        found = [Coordinates(kept[f"{n}/indices"], kept.get(f"{n}/basis"), kept[f"{n}/scores"]) for n in range(len(hooks))]
    else:
        chosen = section.coordinates
        sums: Sequence[Sums | None] = [None] * len(hooks)
        if chosen.method not in ("random", "all"):
            sums = _summed(context, (model, corpus, section, tuple(hooks)), _parts(chunks, chosen.documents))
        found = [coordinates_of(of, chosen, width, section.seed) for of, width in zip(sums, widths, strict=True)]
        named = [(f"{n}/{name}", value) for n, item in enumerate(found) for name, value in item._asdict().items()]
        storage.put_bytes(place, save({name: value.contiguous() for name, value in named if value is not None}))
    return tuple(
        SiteColumns(hook, width, item.indices.numpy(), None if item.basis is None else item.basis.numpy())
        for hook, width, item in zip(hooks, widths, found, strict=True)
    )


def _parts(chunks: Sequence[Chunk], documents: int) -> list[Chunk]:
    """The first so many documents, cut into parts that do not depend on who sums them."""
    parts: list[dict[str, Any]] = []
    left = documents
    for chunk in chunks:
        for first in range(chunk["first"], chunk["first"] + chunk["count"], _PART_DOCUMENTS):
            if left <= 0:
                return parts
            count = min(_PART_DOCUMENTS, chunk["first"] + chunk["count"] - first, left)
            parts.append({**chunk, "first": first, "count": count, "part": len(parts)})
            left -= count
    return parts


def _summed(context: Context, arguments: tuple[Any, ...], parts: Sequence[Chunk]) -> list[Sums]:
    """The sums of each hook point over all parts, added in their order whoever made them."""
    found: dict[int, list[Sums]] = {}
    with context.reporter.task("sae: coordinates", sum(part["count"] for part in parts), "documents") as progress:
        for table in context.runner.map(
            _Score, arguments, pa.Table.from_pylist(list(parts)), Resources(memory_bytes(arguments[0]))
        ):
            for row in table.to_pylist():
                found[row["part"]] = [Sums.from_bytes(data) for data in row["sums"]]
                progress(row["count"])
    of_parts = [found[part] for part in sorted(found)]
    assert len(of_parts) == len(parts)
    return [merge(sums) for sums in zip(*of_parts, strict=True)]
