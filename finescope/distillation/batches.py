"""Which examples an optimiser step trains on, and how they are laid out in rows and passes over the processes."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finescope.distillation.examples import Example

IGNORED = -100  # the target of a position that is not trained on
# Rows hold about so many tokens as the longest example of their step has, times this. Longer rows are fuller, and attention
# costs more in them: two leave 1 % empty at 128 documents a step (four 0.3 %), where one example a row leaves 5 to 14 %.
_ROW_OF_LONGEST = 2


@dataclass(frozen=True, eq=False)
class Step:
    """What one optimiser step trains on: examples by index, each cut to a length."""

    indices: np.ndarray  # [documents] int64
    lengths: np.ndarray  # [documents] int64, tokens

    @property
    def tokens(self) -> int:
        """Tokens that are read, padding not counted."""
        return int(self.lengths.sum())


# Rows of one forward pass; each row is the positions into `Step.indices` of the examples that stand in it, in order.
Pass = list[list[int]]


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass, padded on the right."""

    tokens: np.ndarray  # [rows, longest] int64
    targets: np.ndarray  # [rows, longest] int64: the token after position t where it is trained on, else IGNORED
    positions: np.ndarray | None  # [rows, longest] int64: places within the examples; None where no row has two of them


def split_held_out(count: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` examples to train on and to hold out, int64 and ascending; a tenth at most is held out."""
    order = np.random.default_rng([seed, count]).permutation(count)
    held = min(held_out, count // 10)
    return np.sort(order[held:]), np.sort(order[:held])


def plan_steps(
    examples: Sequence[Example], chosen: np.ndarray, batch_size: int, epochs: int, seed: int, cap_tokens: int | None
) -> list[Step]:
    """All optimiser steps of a training on the examples `chosen`, in order: a permutation an epoch, from (seed, epoch), cut
    into batches.

    With `cap_tokens` it ends after exactly so many tokens, in as many epochs as that takes, the last example cut short;
    it may end up to one prompt earlier, as an example cut before its response has nothing to train on.
    """
    lengths = np.array([len(e.tokens) for e in examples], dtype=np.int64)
    starts = np.array([e.loss_start for e in examples], dtype=np.int64)
    steps: list[Step] = []
    left, epoch = cap_tokens, 0
    while len(chosen) and (epoch < epochs if left is None else left > 0):
        order = chosen[np.random.default_rng([seed, epoch]).permutation(len(chosen))]
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            kept = lengths[indices]
            if left is not None:
                kept = np.clip(left - (np.cumsum(kept) - kept), 0, kept)
                left -= int(kept.sum())
                indices, kept = indices[kept > starts[indices]], kept[kept > starts[indices]]
            if len(indices):
                steps.append(Step(indices, kept))
        epoch += 1
    return steps


def whole(examples: Sequence[Example], indices: np.ndarray) -> Step:
    """The examples `indices` as they are, for a measurement."""
    return Step(indices, np.array([len(examples[index].tokens) for index in indices], dtype=np.int64))


def passes_of(step: Step, rank: int, world_size: int, budget: int, packing: bool) -> list[Pass]:
    """This process's share of a step, in forward passes of at most `budget` tokens, padding counted.

    Every process gets the same number of passes, some perhaps empty: sharded engines talk to each other in each. A row that
    is longer than the budget has a pass of its own.
    """
    rows = _packed(step, world_size, budget) if packing else [[int(at)] for at in np.lexsort((step.indices, -step.lengths))]
    # Longest first and dealt out in turn, so that shares are alike and the rows of a pass too.
    sizes = [int(step.lengths[row].sum()) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: (-sizes[row], row))
    shares = [_within_budget(order[other::world_size], sizes, budget) for other in range(world_size)]
    most = max(len(share) for share in shares)
    own = [[rows[row] for row in rows_of_pass] for rows_of_pass in shares[rank]]
    return own + [[]] * (most - len(own))


def collate(examples: Sequence[Example], step: Step, rows: Pass) -> Batch:
    """The tokens of a pass. An empty one is one token without a target.

    Positions begin anew with each example, and with each token of the padding: the models take that for a border that attention
    does not cross. Rows of one example need none, as nothing looks to the right in a causal model.
    """
    longest = max((int(step.lengths[row].sum()) for row in rows), default=1)
    tokens = np.zeros((max(1, len(rows)), longest), dtype=np.int64)
    targets, positions = np.full_like(tokens, IGNORED), np.zeros_like(tokens)
    for line, row in enumerate(rows):
        begin = 0
        for place in row:
            example, length = examples[int(step.indices[place])], int(step.lengths[place])
            end = begin + length
            tokens[line, begin:end] = example.tokens[:length]
            targets[line, begin + example.loss_start - 1 : end - 1] = example.tokens[example.loss_start : length]
            positions[line, begin:end] = np.arange(length)
            begin = end
    return Batch(tokens, targets, positions if any(len(row) > 1 for row in rows) else None)


def loss_tokens(examples: Sequence[Example], step: Step) -> int:
    """The targets of a whole step, over all processes: what its loss is normalised by."""
    return int(step.lengths.sum()) - sum(examples[int(index)].loss_start for index in step.indices)


def _packed(step: Step, world_size: int, budget: int) -> list[list[int]]:
    """Rows of about equal length: the longest example left goes to the shortest row.

    As many rows as hold all of them at about `_ROW_OF_LONGEST` times the longest, and as many for each process.
    """
    capacity = min(budget, _ROW_OF_LONGEST * int(step.lengths.max()))
    count = math.ceil(step.tokens / capacity)
    count = min(len(step.indices), world_size * math.ceil(count / world_size))
    rows: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, row) for row in range(count)]
    for place in np.lexsort((step.indices, -step.lengths)):
        used, row = shortest[0]
        rows[row].append(int(place))
        heapq.heapreplace(shortest, (used + int(step.lengths[place]), row))
    return rows


def _within_budget(order: list[int], sizes: list[int], budget: int) -> list[list[int]]:
    passes: list[list[int]] = []
    begin = 0
    for end in range(1, len(order) + 1):
        # Longest first: the first row of a pass sets the length that the others are padded to.
        if end == len(order) or sizes[order[begin]] * (end + 1 - begin) > budget:
            passes.append(order[begin:end])
            begin = end
    return passes
