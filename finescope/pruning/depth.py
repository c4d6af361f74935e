"""Depth pruning: which whole blocks leave, by what they do to the stream and by the calibration loss of the model without them.

Greedy: at each turn the block leaves whose removal raises the loss least, of a few candidates that change the stream least. One
walk over the blocks measures all of them: the stream that skips a candidate branches off before it and is carried along, so that
the prefix is computed once and a candidate costs the blocks after it alone, half of a forward pass on the average.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from finescope.errors import RecipeError, StepFailed
from finescope.models.anatomy import blocks_of
from finescope.models.blocks import Blocks
from finescope.models.likelihood import token_nll
from finescope.pruning.stream import Batch, Call, Progress, open_stream
from finescope.schemas import IMPORTANCE, conform

DOCUMENTS = 16  # calibration documents that blocks are judged on, at most
_TRIED = 12  # losses without a block that are measured in all, about equally many a turn: some ten forward passes with the walks
_ROUNDING = 1e-9  # what a ratio may miss a whole number of blocks by, as a share of a block


class Depth(NamedTuple):
    """The blocks that stay, and what was measured of all."""

    kept: tuple[int, ...]  # 0-based, ascending
    sizes: tuple[int, ...]  # parameters of each block
    influences: tuple[float, ...]  # 1 - cosine of the stream before and after the block (ShortGPT, arXiv 2403.03853, eq. 1)
    tried: tuple[dict[int, float], ...]  # a turn: the loss without each candidate; empty where there was but one
    losses: tuple[float, float]  # before the first turn, after the last; in nats a token, as all losses
    num_tokens: int  # predicted tokens that a loss is the mean of

    @property
    def removed(self) -> tuple[int, ...]:
        """The blocks that leave: 0-based, ascending."""
        return tuple(layer for layer in range(len(self.sizes)) if layer not in self.kept)

    def summary(self) -> dict[str, object]:
        """As facts, plain JSON; blocks are counted from 1."""
        return {
            "removed": [layer + 1 for layer in self.removed],
            "influences": list(self.influences),
            "tried": [{str(layer + 1): loss for layer, loss in turn.items()} for turn in self.tried],
            "losses": list(self.losses),
            "tokens": self.num_tokens,
        }

    def rows(self) -> pa.Table:
        """The rows of `schemas.IMPORTANCE` of kind `blocks`, one a block; their importance is the influence."""
        numbers = np.arange(len(self.sizes))
        columns = {
            "layer": numbers + 1,
            "kind": ["blocks"] * len(self.sizes),
            "group_index": np.zeros(len(self.sizes), dtype=np.int64),
            "importance": np.array(self.influences),
            "num_params": np.array(self.sizes),
            "kept": np.isin(numbers, self.kept),
            "general": pa.nulls(len(self.sizes)),
        }
        return conform(pa.table(columns), IMPORTANCE)


def choose_blocks(source: Blocks, batches: Sequence[Batch], ratio: float, filled: bool, progress: Progress) -> Depth:
    """The blocks to keep, chosen on at most 16 documents, evenly spaced in `batches`.

    As many leave as hold at most `ratio` of the block parameters where other groups fill the rest (`filled`), else the number
    that is nearest to it. Each turn measures the loss without some blocks of least influence, twelve in all turns; where that is
    one a turn, the one of least influence leaves. `progress` sums to the tokens of `batches` once.

    Raises:
        RecipeError: nothing else fills the rest, and no block would leave, or all of them.
        StepFailed: no document has two tokens, or a loss is not finite.
    """
    sizes = tuple(sum(p.numel() for p in block.parameters()) for block in blocks_of(source.model, source.anatomy))
    probe, kept, share = _Probe(source, _sample(batches, DOCUMENTS)), list(range(len(sizes))), 1.0 if filled else 0.5
    num_tokens, target = sum(int(mask.sum()) for _, mask in batches), ratio * sum(sizes)
    missing, told, most = target, 0, _candidates(len(sizes), ratio)
    before, influences = probe.whole(kept)
    after: float | None = before
    tried: list[dict[int, float]] = []
    while fitting := [layer for layer in kept if share * sizes[layer] <= missing + _ROUNDING * sizes[layer]]:
        if len(kept) == 1:
            raise RecipeError(f"prune.ratio {ratio} would remove every one of the {len(sizes)} blocks; expected a smaller ratio")
        candidates = sorted(fitting, key=influences.__getitem__)[:most]
        tried.append(probe.without(kept, candidates) if len(candidates) > 1 else {})
        gone = min(candidates, key=lambda layer: tried[-1].get(layer, 0.0))
        after = tried[-1].get(gone)
        kept.remove(gone)
        missing -= sizes[gone]
        done = int(num_tokens * min(1.0, 1 - missing / target))
        progress(done - told)
        told = done
    progress(num_tokens - told)
    if ratio and not filled and len(kept) == len(sizes):
        least = min(sizes) / sum(sizes) / 2
        raise RecipeError(f"prune.ratio {ratio} removes no block: expected 0 or at least {least:.4f}, half of a block's share")
    after = probe.whole(kept)[0] if after is None else after
    return Depth(tuple(kept), sizes, tuple(influences.values()), tuple(tried), (before, after), probe.num_predicted)


def _candidates(num_layers: int, ratio: float) -> int:
    """How many blocks a turn tries, of a model whose blocks are about alike."""
    return max(1, _TRIED // max(1, round(ratio * num_layers)))


class Work(NamedTuple):
    """About what `choose_blocks` takes at most, of a model whose blocks are alike."""

    passes: float  # forward passes through all blocks over its documents
    losses: int  # times that the head runs on them
    streams: int  # that are carried along at a time


def work(num_layers: int, ratio: float) -> Work:
    """A candidate costs the blocks after it, half of them on the average, and each walk the prefix."""
    turns, tried = max(1, round(ratio * num_layers)), _candidates(num_layers, ratio)
    return Work(2.0, 2, 1) if tried == 1 else Work(1 + turns * (1 + tried / 2), 1 + turns * tried, 1 + tried)


class _Probe:
    """The documents that blocks are judged on, and the stream of the whole model before its first block."""

    def __init__(self, source: Blocks, batches: Sequence[Batch]) -> None:
        self._source, self._batches = source, batches
        self._norm = source.model.get_submodule(source.anatomy.final_norm)
        self.num_predicted = sum(int(mask[:, 1:].sum()) for _, mask in batches)
        if not self.num_predicted:
            raise StepFailed("blocks: no calibration document has two tokens")
        self._stream = open_stream(source.model, source.anatomy, batches)

    @torch.no_grad()
    def whole(self, kept: Sequence[int]) -> tuple[float, dict[int, float]]:
        """The loss of the blocks `kept` in nats a token, and the influence of each.

        That is 1 - cosine of the stream before and after it, a mean over the tokens that are not padding.
        """
        hidden, influences = self._stream.hidden, {}
        for layer in kept:
            with self._source.block(layer) as block:
                after = self._through(block, hidden, self._stream.calls[layer])
            cosines = [
                nn.functional.cosine_similarity(old[mask.bool()].float(), new[mask.bool()].float(), dim=-1)
                for old, new, (_, mask) in zip(hidden, after, self._batches, strict=True)
            ]
            influences[layer] = 1 - float(torch.cat(cosines).double().mean())
            hidden = after
        return self._loss(hidden, "of the model"), influences

    @torch.no_grad()
    def without(self, kept: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """The loss of the blocks `kept` without each of `candidates`, in nats a token."""
        branches: dict[int, list[Tensor]] = {}
        hidden = self._stream.hidden
        for layer in kept:
            calls = self._stream.calls[layer]
            with self._source.block(layer) as block:
                branches = {gone: self._through(block, states, calls) for gone, states in branches.items()}
                if layer in candidates:
                    branches[layer] = hidden
                if len(branches) < len(candidates):
                    hidden = self._through(block, hidden, calls)
        return {gone: self._loss(states, f"without block {gone + 1}") for gone, states in branches.items()}

    def _through(self, block: nn.Module, hidden: list[Tensor], calls: list[Call]) -> list[Tensor]:
        device = self._stream.device
        return [
            block(states.to(device), *call.positional, **call.named).cpu() for states, call in zip(hidden, calls, strict=True)
        ]

    def _loss(self, hidden: list[Tensor], what: str) -> float:
        model, total = self._source.model, 0.0
        for states, (input_ids, mask) in zip(hidden, self._batches, strict=True):
            predicts = mask[:, 1:].bool()
            targets = input_ids[:, 1:][predicts].to(model.device)
            total += float(token_nll(model, self._norm(states[:, :-1][predicts].to(model.device)), targets).double().sum())
        if not np.isfinite(total):
            raise StepFailed(f"blocks: the loss {what} is not finite (dtype {model.dtype}); use float32 or bfloat16")
        return total / self.num_predicted


def _sample(batches: Sequence[Batch], most: int) -> list[Batch]:
    """At most `most` documents, evenly spaced; batches may be sorted by length."""
    step = -(-sum(len(mask) for _, mask in batches) // most)
    sample, seen = [], 0
    for input_ids, mask in batches:
        rows = slice(-seen % step, None, step)
        seen += len(mask)
        if len(mask[rows]):
            sample.append((input_ids[rows], mask[rows]))
    return sample
