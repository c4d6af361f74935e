"""Which documents of a ranking are kept. All limits hold at once: the strictest ends the selection."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from finescope.config import CurateSection
from finescope.curation.diversity import MarginalRelevance
from finescope.curation.near_duplicates import NearDuplicates

# Best documents, filtered, among which a diverse selection chooses, for each one that it keeps.
POOL = 4
# Documents that are read beyond those that are to be kept, and an eighth: with few rejects one pass over the scores is enough.
SPARE = 64


def with_spare(documents: int) -> int:
    """How many are read where so many are to be kept."""
    return documents + documents // 8 + SPARE


class Limits(NamedTuple):
    """How much is kept at most; None: no limit."""

    documents: int | None
    tokens: int | None
    per_seed: int | None

    @property
    def pool(self) -> "Limits":
        """Of the candidates for a diverse selection of so many: enough of each seed to fill its quota from a full pool."""
        most, quota = (None if limit is None else POOL * limit for limit in (self.documents, self.per_seed))
        return Limits(most, None, quota)

    @classmethod
    def of(cls, section: CurateSection, scored: int, seeds: int) -> "Limits":
        """Those of the recipe, for a corpus of `scored` documents."""
        shares = [] if section.share is None else [max(math.floor(section.share * scored + 1e-9), 1)]
        quota = [] if section.per_seed is None else [section.per_seed * seeds]
        most = [*([] if section.documents is None else [section.documents]), *shares, *quota]
        return cls(min(most, default=None), section.tokens, section.per_seed)


class Candidate(NamedTuple):
    """The next document of a ranking, and what `Examiner` found."""

    position: int  # in the ranking, best first, from 0
    doc_id: str
    seed: int  # the nearest
    num_tokens: int
    hash: bytes | None = None
    sketch: bytes | None = None
    item: str | None = None


@dataclass
class Selection:
    """Takes candidates, best first. The first reason against one is its reject's reason: `duplicate` of a better one,
    `contaminated` by an evaluation item, `near_duplicate` of a better one, `per_seed` quota full."""

    limits: Limits
    near: NearDuplicates | None
    kept: list[int] = field(default_factory=list)  # positions, in the order in which they were kept
    rejected: list[tuple[int, str, str]] = field(default_factory=list)  # position, reason, detail
    tokens: int = 0  # of the kept
    full: bool = False
    _seen: dict[bytes, str] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    _by_seed: dict[int, int] = field(default_factory=dict)

    @property
    def looked_at(self) -> int:
        """Candidates that were kept or rejected."""
        return len(self.kept) + len(self.rejected)

    @property
    def full_seeds(self) -> frozenset[int]:
        """Seeds whose quota is used up: no candidate of theirs is kept any more, whatever its text."""
        return frozenset(seed for seed, count in self._by_seed.items() if count == self.limits.per_seed)

    def offer(self, candidate: Candidate) -> None:
        """Take or reject the next candidate; `full` instead, where a limit leaves no room for it."""
        reason, detail = self._objection(candidate)
        if reason:
            self.rejected.append((candidate.position, reason, detail))
            return
        if self.limits.tokens is not None and self.tokens + candidate.num_tokens > self.limits.tokens:
            self.full = True
            return
        self.kept.append(candidate.position)
        self.tokens += candidate.num_tokens
        self._by_seed[candidate.seed] = self._by_seed.get(candidate.seed, 0) + 1
        if candidate.hash is not None:
            self._seen[candidate.hash] = candidate.doc_id
        if self.near is not None and candidate.sketch is not None:
            self.near.keep(candidate.position, candidate.sketch)
            self._names[candidate.position] = candidate.doc_id
        self.full = len(self.kept) == self.limits.documents

    def _objection(self, candidate: Candidate) -> tuple[str, str]:
        if candidate.hash is not None and (first := self._seen.get(candidate.hash)) is not None:
            return "duplicate", f"of {first}"
        if candidate.item is not None:
            return "contaminated", candidate.item
        if (found := self._similar(candidate)) is not None:
            return "near_duplicate", f"of {self._names[found[0]]}, similarity {found[1]:.3f}"
        if self.limits.per_seed is not None and self._by_seed.get(candidate.seed, 0) >= self.limits.per_seed:
            return "per_seed", f"seed {candidate.seed} has {self.limits.per_seed} better ones"
        return "", ""

    def _similar(self, candidate: Candidate) -> tuple[int, float] | None:
        if self.near is None or candidate.sketch is None:
            return None
        return self.near.most_similar(candidate.position, candidate.sketch)


def diverse(pool: Sequence[Candidate], order: MarginalRelevance, limits: Limits) -> Selection:
    """The most diverse of a pool that has passed the filters. What is left over has the reason `diversity`."""
    selection = Selection(limits, None)
    while not selection.full and (best := order.best()) is not None:
        count = len(selection.kept)
        selection.offer(pool[best])
        if len(selection.kept) > count:
            order.take(best)
        else:
            order.drop(best)
    done = {*selection.kept, *(position for position, _, _ in selection.rejected)}
    for index, candidate in enumerate(pool):
        if candidate.position not in done:
            nearest, similarity = order.nearest[index], order.similarity[index]
            detail = f"similarity {similarity:.3f} to {pool[nearest].doc_id}" if nearest >= 0 else "of a lower score"
            selection.rejected.append((candidate.position, "diversity", detail))
    return selection
