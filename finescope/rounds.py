"""Rounds of pruning and training in turns (arXiv 2606.24747), as data: which steps there are and what each is to do."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from finescope.config import ALL_STEPS, DistillSection, PruneSection

_IN_ROUNDS = ("prune", "distill")


class Round(NamedTuple):
    """One round: the names of its two steps and their sections."""

    prune: str  # prune-1, prune-2, ...; of the last round the plain name
    distill: str
    pruning: PruneSection  # its ratio is what of the base model's block parameters is gone after this round
    training: DistillSection
    before: str | None  # the `distill` of the round before, whose student is pruned now


def rounds_of(pruning: PruneSection, training: DistillSection) -> tuple[Round, ...]:
    """The rounds of a recipe: of n each leaves (1 - ratio)^(1/n) of the block parameters that it finds.

    A control is trained in the last round alone: it is the last pruned model's.
    """
    rounds: list[Round] = []
    for number in range(1, pruning.rounds + 1):
        last = number == pruning.rounds
        prune, distill = _IN_ROUNDS if last else (f"{step}-{number}" for step in _IN_ROUNDS)
        ratio = pruning.ratio if last else 1 - (1 - pruning.ratio) ** (number / pruning.rounds)
        of_round = pruning.model_copy(update={"ratio": ratio, "rounds": 1})
        trained = training.model_copy(update={"control": training.control and last})
        rounds.append(Round(prune, distill, of_round, trained, rounds[-1].distill if rounds else None))
    return tuple(rounds)


def kind_of(step: str) -> str:
    """The step of which `step` is a round: `prune` of `prune-1`."""
    return step.partition("-")[0]


def round_of(step: str) -> int | None:
    """Which round a step is of; None: the last, or the step has no rounds."""
    _, _, number = step.partition("-")
    return int(number) if number else None


def in_order(steps: Iterable[str]) -> list[str]:
    """Names of steps in the order of the pipeline: the rounds in turns, the last after the numbered ones."""

    def place(step: str) -> tuple[int, float, int]:
        at, number = ALL_STEPS.index(kind_of(step)), round_of(step)
        if kind_of(step) not in _IN_ROUNDS:
            return at, 0, at
        return ALL_STEPS.index(_IN_ROUNDS[0]), math.inf if number is None else number, at

    return sorted(steps, key=place)
