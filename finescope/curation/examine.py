"""What the filters of a selection need to know of each document, found where its text is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from finescope.curation.decontaminate import NgramIndex
from finescope.curation.near_duplicates import normalised_hash, sketches

# They stand beside the columns of the source, hence the names. Null where the recipe does not ask for it, and `__item` where the
# document is clean.
FINDINGS = pa.schema([("__hash", pa.binary(16)), ("__sketch", pa.binary()), ("__item", pa.string())])


@dataclass(frozen=True)
class Examiner:
    """Looks at texts one by one; nothing that it finds depends on another document of the corpus."""

    exact: bool  # whether equal texts are looked for
    shingle: int | None  # words of a shingle; None: near-duplicates are not looked for
    ngrams: NgramIndex | None  # of the evaluation sets

    def __call__(self, texts: Sequence[str]) -> pa.Table:
        """FINDINGS, a row a text."""
        nothing = [None] * len(texts)
        columns = [
            [normalised_hash(text) for text in texts] if self.exact else nothing,
            nothing if self.shingle is None else sketches(texts, self.shingle),
            nothing if self.ngrams is None else [self.ngrams.hit(text) for text in texts],
        ]
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, FINDINGS, strict=True)], schema=FINDINGS)
