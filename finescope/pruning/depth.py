"""Depth pruning: which whole blocks leave, by the calibration loss of the model without them.

Greedy: at each turn the block leaves whose removal raises the loss least. One walk over the blocks measures several candidates:
the stream that skips a candidate branches off before it and is carried along, so that the prefix is computed once and a
candidate costs the blocks after it alone: all L of them about half of L forward passes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finescope.errors import RecipeError, StepFailed
from finescope.models.anatomy import Anatomy, blocks_of
from finescope.models.likelihood import token_nll
from finescope.pruning.importance import Batch, Progress
from finescope.pruning.stream import Call, Stream, open_stream
from finescope.schemas import IMPORTANCE, conform

DOCUMENTS = 32  # calibration documents that the loss is measured on, at most
_CANDIDATES = 16  # streams that a walk carries along; after the first turn only so many blocks are tried
_ROUNDING = 1e-9  # what a ratio may miss a whole number of blocks by, as a share of a block


class Depth(NamedTuple):
    """The blocks that stay, and what was measured of all."""

    kept: tuple[int, ...]  # 0-based, ascending
    sizes: tuple[int, ...]  # parameters of each block
    rises: tuple[float, ...]  # of the loss when the block alone is removed, in nats a token
    influences: tuple[float, ...]  # 1 - cosine of the stream before and after the block (ShortGPT, arXiv 2403.03853, eq. 1)
    losses: tuple[float, ...]  # of the whole model, then after each turn, in nats a token
    num_tokens: int  # predicted tokens that the loss is the mean of

    @property
    def removed(self) -> tuple[int, ...]:
        """The blocks that leave: 0-based, ascending."""
        return tuple(layer for layer in range(len(self.sizes)) if layer not in self.kept)

    def summary(self) -> dict[str, object]:
        """As facts, plain JSON; blocks are counted from 1."""
        facts = {"rises": self.rises, "influences": self.influences, "losses": self.losses}
        removed = [layer + 1 for layer in self.removed]
        return {"removed": removed, **{name: list(values) for name, values in facts.items()}, "tokens": self.num_tokens}

    def rows(self) -> pa.Table:
        """The rows of `schemas.IMPORTANCE` of kind `blocks`, one a block."""
        numbers = np.arange(len(self.sizes))
        columns = {
            "layer": numbers + 1,
            "kind": ["blocks"] * len(self.sizes),
            "group_index": np.zeros(len(self.sizes), dtype=np.int64),
            "importance": np.array(self.rises),
            "num_params": np.array(self.sizes),
            "kept": np.isin(numbers, self.kept),
        }
        return conform(pa.table(columns), IMPORTANCE)


def choose_blocks(
    model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Batch], ratio: float, filled: bool, progress: Progress
) -> Depth:
    """The blocks to keep, chosen on at most 32 documents, evenly spaced in `batches`.

    As many leave as hold at most `ratio` of the block parameters where other groups fill the rest (`filled`), else the number
    that is nearest to it. The first turn measures every block; later turns try the 16 whose own removal cost least, so that
    depth does not square the cost. `progress` sums to the tokens of `batches` once.

    Raises:
        RecipeError: nothing else fills the rest, and no block would leave, or all of them.
        StepFailed: no document has two tokens, or a loss is not finite.
    """
    sizes = tuple(sum(parameter.numel() for parameter in block.parameters()) for block in blocks_of(model, anatomy))
    probe, kept, share = _Probe(model, anatomy, _sample(batches, DOCUMENTS)), list(range(len(sizes))), 1.0 if filled else 0.5
    num_tokens, target = sum(int(mask.sum()) for _, mask in batches), ratio * sum(sizes)
    missing, told = target, 0

    def fitting() -> list[int]:
        return [layer for layer in kept if share * sizes[layer] <= missing + _ROUNDING * sizes[layer]]

    whole, influences = probe.whole()
    alone = without = probe.without(kept, kept)
    losses, candidates = [whole], fitting()
    while candidates:
        if len(kept) == 1:
            raise RecipeError(f"prune.ratio {ratio} would remove every one of the {len(sizes)} blocks; expected a smaller ratio")
        gone = min(candidates, key=without.__getitem__)
        kept.remove(gone)
        losses.append(without[gone])
        missing -= sizes[gone]
        done = int(num_tokens * min(1.0, 1 - missing / target))
        progress(done - told)
        told = done
        candidates = sorted(sorted(fitting(), key=alone.__getitem__)[:_CANDIDATES])
        without = probe.without(kept, candidates)
    progress(num_tokens - told)
    if ratio and not filled and len(kept) == len(sizes):
        least = min(sizes) / sum(sizes) / 2
        raise RecipeError(f"prune.ratio {ratio} removes no block: expected 0 or at least {least:.4f}, half of a block's share")
    rises = tuple(alone[layer] - whole for layer in range(len(sizes)))
    return Depth(tuple(kept), sizes, rises, influences, tuple(losses), probe.num_predicted)


def passes(num_layers: int, ratio: float) -> float:
    """About how many forward passes over the documents of `choose_blocks` it takes, of a model whose blocks are alike.

    A candidate costs the blocks after it, half of them on the average, and each walk the prefix.
    """
    walks = [num_layers] + [min(_CANDIDATES, num_layers - turn) for turn in range(1, int(ratio * num_layers))]
    return 1 + sum(candidates / 2 + -(-candidates // _CANDIDATES) for candidates in walks)


class _Probe:
    """The documents that blocks are judged on, and the stream of the whole model before its first block."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.blocks, self.norm = blocks_of(model, anatomy), model.get_submodule(anatomy.final_norm)
        self.num_predicted = sum(int(mask[:, 1:].sum()) for _, mask in batches)
        if not self.num_predicted:
            raise StepFailed("blocks: no calibration document has two tokens")
        self.stream: Stream = open_stream(model, anatomy, batches)

    @torch.no_grad()
    def whole(self) -> tuple[float, tuple[float, ...]]:
        """The loss of the whole model in nats a token, and the influence of each block: 1 - cosine of the stream before and after
        it, a mean over the tokens that are not padding."""
        hidden, influences = self.stream.hidden, []
        masks = [mask.bool().to(states.device) for states, (_, mask) in zip(hidden, self.batches, strict=True)]
        for block, calls in zip(self.blocks, self.stream.calls, strict=True):
            after = _through(block, hidden, calls)
            cosines = [
                nn.functional.cosine_similarity(old[mask].float(), new[mask].float(), dim=-1)
                for old, new, mask in zip(hidden, after, masks, strict=True)
            ]
            influences.append(1 - float(torch.cat(cosines).double().mean()))
            hidden = after
        return self._loss(hidden, "of the whole model"), tuple(influences)

    @torch.no_grad()
    def without(self, kept: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """The loss of the blocks `kept` without each of `candidates`, in nats a token."""
        losses: dict[int, float] = {}
        for start in range(0, len(candidates), _CANDIDATES):
            branches: dict[int, list[Tensor]] = {}
            hidden = self.stream.hidden
            for layer in kept:
                block, calls = self.blocks[layer], self.stream.calls[layer]
                branches = {gone: _through(block, states, calls) for gone, states in branches.items()}
                if layer in candidates[start : start + _CANDIDATES]:
                    branches[layer] = hidden
                hidden = _through(block, hidden, calls)
            losses |= {gone: self._loss(states, f"without block {gone + 1}") for gone, states in branches.items()}
        return losses

    def _loss(self, hidden: list[Tensor], what: str) -> float:
        total = 0.0
        for states, (input_ids, mask) in zip(hidden, self.batches, strict=True):
            predicts = mask[:, 1:].bool().to(states.device)
            targets = input_ids[:, 1:].to(states.device)[predicts]
            total += float(token_nll(self.model, self.norm(states)[:, :-1][predicts], targets).double().sum())
        if not np.isfinite(total):
            raise StepFailed(f"blocks: the loss {what} is not finite (dtype {self.model.dtype}); use float32 or bfloat16")
        return total / self.num_predicted


def _through(block: nn.Module, hidden: list[Tensor], calls: list[Call]) -> list[Tensor]:
    return [block(states, *call.positional, **call.named) for states, call in zip(hidden, calls, strict=True)]


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
