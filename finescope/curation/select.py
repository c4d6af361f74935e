"""The exact best M of any number of scores, and which of the candidates are kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl

from finescope import storage
from finescope.config import CurateSection
from finescope.corpus.decontaminate import NgramIndex, normalised_hash

_COLUMNS = ["doc_id", "file", "row_group", "row", "score", "seed"]
_ROWS_AT_A_TIME = 1_000_000


def candidates(score_files: Sequence[str], threshold: float | None, most: int) -> pl.DataFrame:
    """The `most` best rows of the `scores` table, best first, ties broken by doc_id.

    Memory is that of the result and `_ROWS_AT_A_TIME`, however many files there are.
    """
    best: list[pl.DataFrame] = []
    for path in score_files:
        shard = pl.DataFrame(storage.read_parquet(path, _COLUMNS))
        best.append(shard if threshold is None else shard.filter(pl.col("score") >= threshold))
        if sum(frame.height for frame in best) >= most + _ROWS_AT_A_TIME:
            best = [_best(best, most)]
    return _best(best, most)


def _best(frames: Sequence[pl.DataFrame], most: int) -> pl.DataFrame:
    found = pl.concat(frames).bottom_k(most, by=["score", "doc_id"], reverse=[True, False])
    return found.sort(["score", "doc_id"], descending=[True, False])


@dataclass
class Selection:
    """Walks down the ranking and keeps what passes: the first reason against a document is its reject's reason.

    Reasons: `duplicate` of a better one, `contaminated` by an evaluation item, `per_seed` quota full.
    """

    section: CurateSection
    ngrams: NgramIndex | None
    kept: list[int] = field(default_factory=list)  # positions in the ranking
    rejected: list[tuple[int, str, str]] = field(default_factory=list)  # position, reason, detail
    _seen: dict[str, str] = field(default_factory=dict)
    _by_seed: dict[int, int] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether enough documents are kept."""
        return len(self.kept) >= self.section.documents

    def offer(self, position: int, doc_id: str, seed: int, text: str) -> None:
        """Take or reject the next document of the ranking."""
        reason, detail = self._objection(seed, text)
        if reason:
            self.rejected.append((position, reason, detail))
            return
        self.kept.append(position)
        self._by_seed[seed] = self._by_seed.get(seed, 0) + 1
        if self.section.deduplicate:
            self._seen[normalised_hash(text)] = doc_id

    def _objection(self, seed: int, text: str) -> tuple[str, str]:
        if self.section.deduplicate and (first := self._seen.get(normalised_hash(text))) is not None:
            return "duplicate", f"of {first}"
        if self.ngrams is not None and (item := self.ngrams.hit(text)) is not None:
            return "contaminated", item
        if self.section.per_seed is not None and self._by_seed.get(seed, 0) >= self.section.per_seed:
            return "per_seed", f"seed {seed} has its {self.section.per_seed} documents"
        return "", ""


def windows(total: int, first: int) -> Iterator[tuple[int, int]]:
    """Spans of a ranking to read one after the other: the winners first, then as many again, doubling."""
    start, size = 0, first
    while start < total:
        yield start, min(start + size, total)
        start, size = start + size, size * 2
