"""Pooled document codes as sparse rows, and the corpus statistics that scoring weighs them with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Codes:
    """N sparse codes over `num_latents` latents: row i owns entries offsets[i]:offsets[i + 1]."""

    offsets: np.ndarray  # int64 [N + 1]
    ids: np.ndarray  # int32 [entries]
    values: np.ndarray  # float32 [entries], not negative
    num_latents: int

    @classmethod
    def concatenated(cls, parts: Sequence["Codes"]) -> "Codes":
        """The rows of all parts, at least one, in order."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        ids, values = np.concatenate([part.ids for part in parts]), np.concatenate([part.values for part in parts])
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), ids, values, parts[0].num_latents)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Latent ids and values of one code."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.values[span]

    def slices(self, rows: int) -> Iterator["Codes"]:
        """The codes in order, `rows` at a time, so that what is made of them has a bounded size."""
        for start in range(0, len(self), rows):
            offsets = self.offsets[start : start + rows + 1]
            span = slice(offsets[0], offsets[-1])
            yield Codes(offsets - offsets[0], self.ids[span], self.values[span], self.num_latents)

    def with_values(self, values: np.ndarray) -> "Codes":
        """The same latents with other values."""
        return Codes(self.offsets, self.ids, values.astype(np.float32), self.num_latents)

    def dense(self) -> np.ndarray:
        """float32 [N, num_latents]; for the few codes of the seeds only."""
        matrix = np.zeros((len(self), self.num_latents), np.float32)
        matrix[np.repeat(np.arange(len(self)), np.diff(self.offsets)), self.ids] = self.values
        return matrix

    def sum_rows(self, entries: np.ndarray) -> np.ndarray:
        """Sum over each row of `entries` [entries, ...]; float64 [N, ...]. A row without entries sums to zero."""
        totals = np.zeros((len(self), *entries.shape[1:]), np.float64)
        filled = np.flatnonzero(np.diff(self.offsets))
        if len(filled):
            totals[filled] = np.add.reduceat(entries.astype(np.float64, copy=False), self.offsets[:-1][filled], axis=0)
        return totals


def codes_of(table: pa.Table, num_latents: int) -> Codes:
    """The codes of an `embeddings` table."""
    ids = table.column("latent_ids").combine_chunks()
    values = table.column("latent_values").combine_chunks()
    lengths = np.asarray(ids.value_lengths().fill_null(0), dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Codes(
        offsets,
        np.asarray(ids.flatten(), dtype=np.int32),
        np.asarray(values.flatten().cast(pa.float32()), dtype=np.float32),
        num_latents,
    )


@dataclass(frozen=True)
class CorpusStatistics:
    """What the weightings need to know of a corpus; sums, so that shards add up."""

    documents: int
    sqrt_sum: np.ndarray  # float64 [num_latents], sum of square roots of the L1-normalised codes
    value_sum: np.ndarray  # float64 [num_latents], sum of the codes
    share_sum: np.ndarray  # float64 [num_latents], sum of the L1-normalised codes: the roots' squares
    active: np.ndarray  # int64 [num_latents], documents in which a latent is active

    @classmethod
    def of(cls, codes: Codes) -> "CorpusStatistics":
        """Statistics of some codes."""
        shares = normalise(codes).values
        roots = np.bincount(codes.ids, weights=np.sqrt(shares), minlength=codes.num_latents)
        sums = np.bincount(codes.ids, weights=shares, minlength=codes.num_latents)
        values = np.bincount(codes.ids, weights=codes.values, minlength=codes.num_latents)
        return cls(len(codes), roots, values, sums, np.bincount(codes.ids[codes.values > 0], minlength=codes.num_latents))

    def row(self) -> dict[str, Any]:
        """The sums as a row of a table, which is how they travel."""
        return {
            "documents": self.documents,
            "sqrt_sum": self.sqrt_sum.tolist(),
            "value_sum": self.value_sum.tolist(),
            "share_sum": self.share_sum.tolist(),
            "active": self.active.tolist(),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "CorpusStatistics":
        """What `row` gave."""
        sums = np.array(row["sqrt_sum"]), np.array(row["value_sum"]), np.array(row["share_sum"])
        return cls(row["documents"], *sums, np.array(row["active"], np.int64))

    def __add__(self, other: "CorpusStatistics") -> "CorpusStatistics":
        return CorpusStatistics(
            self.documents + other.documents,
            self.sqrt_sum + other.sqrt_sum,
            self.value_sum + other.value_sum,
            self.share_sum + other.share_sum,
            self.active + other.active,
        )


def normalise(codes: Codes) -> Codes:
    """Codes whose values sum to one, so that a document's length and loudness drop out before the square root."""
    totals = codes.sum_rows(codes.values)
    scale = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
    return codes.with_values(codes.values * np.repeat(scale, np.diff(codes.offsets)))
