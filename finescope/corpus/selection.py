"""Which part of a unit is read, and what is expected of it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Columns and rows of a unit."""

    columns: tuple[str, ...] | None = None  # None: all
    text_columns: frozenset[str] = frozenset()  # read as text: UTF-8, neither list nor object, else the row is rejected
    nested_columns: frozenset[str] = frozenset()  # read, and may be nested (messages): UTF-8, else the row is rejected
    limit: int | None = None  # the unit's first rows; None: all
    rows: frozenset[int] | None = None  # these rows only; None: all

    def stops_at(self, row: int) -> bool:
        """Whether neither this row nor one after it is read."""
        return self.limit is not None and row >= self.limit

    def wants(self, row: int) -> bool:
        """Whether this row is read, if `stops_at` has not ended the reading."""
        return self.rows is None or row in self.rows

    def mask(self, rows: np.ndarray) -> np.ndarray:
        """Which of `rows` int64 [N] are read: bool [N]."""
        mask = np.ones(len(rows), dtype=bool)
        if self.limit is not None:
            mask &= rows < self.limit
        if self.rows is not None:
            mask &= np.isin(rows, np.fromiter(self.rows, dtype=np.int64, count=len(self.rows)))
        return mask
