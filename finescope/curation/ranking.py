"""The exact best of any number of scores, best first, ties broken by doc_id.

Two passes. The first reads scores and lengths alone and counts them by the leading bits of the score, which says how high
the best rows must lie, to a two-thousandth of the score; the second reads the other columns and lets go at once of what
lies lower. Memory is that of the result, of a few row groups and of the counts, however many rows there are.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from finescope import schemas, storage

COLUMNS = ["doc_id", "file", "row_group", "row", "num_tokens", "score", "seed"]
# Rows that may be held beside the result before it is cut to size again.
_ROWS_AT_A_TIME = 1_000_000
# Files that are read at a time: enough for two cores, and for a store that answers slowly.
_READERS = 4
# Leading bits of a score that are counted by: sign, exponent and 11 bits of the mantissa.
_KEY_BITS = 20
_PLACE = ["file", "row_group", "row"]

_Read = TypeVar("_Read")
_Counted = tuple[np.ndarray, np.ndarray]  # keys int64 [N], lengths int32 [N]


class Eligible(NamedTuple):
    """Which rows are ranked; None: all."""

    threshold: float | None = None  # the lowest score
    seeds: frozenset[int] | None = None  # the nearest seed is one of these

    @property
    def columns(self) -> list[str]:
        """What `mask` looks at."""
        return ["score"] if self.seeds is None else ["score", "seed"]

    def mask(self, table: pa.Table) -> np.ndarray | None:
        """Which rows are ranked, bool [N]; None: all."""
        masks = []
        if self.threshold is not None:
            masks.append(table.column("score").to_numpy() >= np.float32(self.threshold))
        if self.seeds is not None:
            masks.append(np.isin(table.column("seed").to_numpy(), sorted(self.seeds)))
        return np.logical_and.reduce(masks) if masks else None


@dataclass(frozen=True)
class Ranking:
    """All scored documents that are eligible, as counts by score; `best` reads them."""

    files: tuple[str, ...]  # shards of the `scores` table
    eligible: Eligible
    documents: np.ndarray  # int64 [2 ** _KEY_BITS], by the leading bits of the score, lowest score first
    tokens: np.ndarray  # int64 [2 ** _KEY_BITS]: their tokens as `embed` counted them

    @classmethod
    def of(cls, files: Sequence[str], eligible: Eligible) -> "Ranking":
        """Count the rows of `files` that are eligible. The first pass."""
        documents, tokens = np.zeros(2**_KEY_BITS, np.int64), np.zeros(2**_KEY_BITS, np.int64)
        for keys, lengths in _at_least_rows(_in_order(lambda path: _counted(path, eligible), files), _ROWS_AT_A_TIME):
            documents += np.bincount(keys, minlength=len(documents))
            # Sums of a few million lengths are far below 2^53: float64 adds them exactly.
            tokens += np.bincount(keys, weights=lengths, minlength=len(tokens)).astype(np.int64)
        return cls(tuple(files), eligible, documents, tokens)

    @property
    def size(self) -> int:
        """Documents that are eligible."""
        return int(self.documents.sum())

    def reaching(self, tokens: int) -> int:
        """So many of the best have `tokens` tokens at least; all, where all have fewer."""
        reached = np.flatnonzero(np.cumsum(self.tokens[::-1]) >= tokens)
        return int(np.cumsum(self.documents[::-1])[reached[0]]) if len(reached) else self.size

    def of_seeds(self, seeds: frozenset[int]) -> "Ranking":
        """The documents whose nearest seed is one of these, counted anew."""
        return Ranking.of(self.files, self.eligible._replace(seeds=seeds))

    def after(self, ranked: pl.DataFrame, count: int) -> pl.DataFrame:
        """The `count` best rows that come after `ranked`, which has all eligible rows down to its last."""
        seeds = self.eligible.seeds
        seen = ranked.height if seeds is None else int(ranked["seed"].is_in(sorted(seeds)).sum())
        return self.best(min(seen + count, self.size)).slice(seen)

    def _lowest_key(self, most: int) -> int:
        enough = np.flatnonzero(np.cumsum(self.documents[::-1]) >= most)
        return len(self.documents) - 1 - int(enough[0]) if len(enough) else 0

    def lowest(self, most: int) -> float:
        """A score that all of the `most` best reach, and none reaches that is more than a two-thousandth below the worst of
        them. From the counts alone."""
        ordered = np.uint32(self._lowest_key(most) << (32 - _KEY_BITS))
        bits = ordered ^ np.uint32(1 << 31) if ordered >> 31 else ~ordered
        return float(np.array(bits, np.uint32).view(np.float32))

    def best(self, most: int) -> pl.DataFrame:
        """The `most` best rows, `COLUMNS`. The second pass."""
        lowest = self._lowest_key(most)
        held, rows = [pl.DataFrame(schemas.SCORES.empty_table().select(COLUMNS))], 0
        if most == 0:
            return held[0]
        for frame in _in_order(lambda path: _at_least(path, lowest, self.eligible), self.files):
            held.append(frame)
            rows += frame.height
            if rows >= most + _ROWS_AT_A_TIME:
                held = [_cut(held, most)]
                rows = held[0].height
        return _cut(held, most).sort(["score", "doc_id"], descending=[True, False])


def _cut(frames: Sequence[pl.DataFrame], most: int) -> pl.DataFrame:
    return pl.concat(frames).bottom_k(most, by=["score", "doc_id"], reverse=[True, False])


def _keys(scores: np.ndarray) -> np.ndarray:
    """The leading bits of float32 [N] as integers in the order of the scores, int64 [N]."""
    bits = (scores + np.float32(0)).view(np.uint32)  # minus zero becomes zero, which it equals
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> (32 - _KEY_BITS)).astype(np.int64)


def _counted(path: str, eligible: Eligible) -> Iterator[_Counted]:
    with storage.open_input(path) as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.metadata.num_row_groups):
            table = parquet.read_row_group(group, columns=[*eligible.columns, "num_tokens"])
            scores, lengths = table.column("score").to_numpy(), table.column("num_tokens").to_numpy()
            mask = eligible.mask(table)
            yield (_keys(scores), lengths) if mask is None else (_keys(scores[mask]), lengths[mask])


def _at_least(path: str, lowest: int, eligible: Eligible) -> Iterator[pl.DataFrame]:
    """Rows whose score's key is `lowest` at least; what else a row group has is read only where it has such a row."""
    with storage.open_input(path) as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.metadata.num_row_groups):
            looked_at = parquet.read_row_group(group, columns=eligible.columns)
            wanted = _keys(looked_at.column("score").to_numpy()) >= lowest
            mask = eligible.mask(looked_at)
            if mask is not None:
                wanted &= mask
            if wanted.any():
                table = parquet.read_row_group(group, columns=COLUMNS).select(COLUMNS)
                yield pl.DataFrame(table.filter(pa.array(wanted)))


def _at_least_rows(counted: Iterator[_Counted], rows: int) -> Iterator[_Counted]:
    """Arrays joined until they have `rows` rows, so that counting does not cost more than a small file is worth."""
    held: list[_Counted] = []
    for found in counted:
        held.append(found)
        if sum(len(keys) for keys, _ in held) >= rows:
            yield np.concatenate([keys for keys, _ in held]), np.concatenate([lengths for _, lengths in held])
            held.clear()
    if held:
        yield np.concatenate([keys for keys, _ in held]), np.concatenate([lengths for _, lengths in held])


def _in_order(read: Callable[[str], Iterator[_Read]], files: Sequence[str]) -> Iterator[_Read]:
    """What `read` yields of each file, in the order of the files, a few of them read at a time."""
    left = iter(files)
    waiting: deque[Future[list[_Read]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        while True:
            for path in islice(left, _READERS - len(waiting)):
                waiting.append(pool.submit(lambda path: list(read(path)), path))
            if not waiting:
                return
            yield from waiting.popleft().result()


def located_rows(files: Sequence[str], located: pl.DataFrame, columns: Sequence[str]) -> pa.Table:
    """Some columns of the rows that `located` (file, row_group, row) names, in its order, from the shards of a table.

    Columns are read only of row groups that hold one of them.
    """
    wanted = located.select(_PLACE).with_row_index("at")
    found = list(_in_order(lambda path: _located(path, wanted, list(columns)), files))
    places = np.concatenate([at for at, _ in found])
    assert len(places) == located.height, (len(places), located.height)
    return pa.concat_tables([table for _, table in found]).take(pa.array(np.argsort(places)))


def _located(path: str, wanted: pl.DataFrame, columns: list[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """(places among those wanted, rows) of each row group that holds some."""
    with storage.open_input(path) as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.metadata.num_row_groups):
            places = pl.DataFrame(parquet.read_row_group(group, columns=_PLACE)).with_row_index("here")
            hits = places.join(wanted, on=_PLACE, how="inner")
            if hits.height:
                rows = parquet.read_row_group(group, columns=columns).select(columns)
                yield hits["at"].to_numpy(), rows.take(pa.array(hits["here"].to_numpy()))
