"""How much a corpus holds, about, from the heads of a few of its files: for a plan, before anything is counted."""

import io
from collections.abc import Sequence

import pyarrow as pa

from finescope.config import CorpusSection
from finescope.corpus.files import CorpusFile
from finescope.corpus.shapes import columns_in, head_of
from finescope.corpus.streams import lines_of
from finescope.corpus.units import check_columns, inspect_range

_SAMPLED_FILES = 8


def estimate(files: Sequence[CorpusFile], section: CorpusSection) -> tuple[int, int]:
    """Documents, and bytes of their text, of all files: those of up to eight, evenly taken, scaled to the bytes of all.

    Raises:
        CorpusError: a column that the recipe names is not there.
    """
    count = min(_SAMPLED_FILES, len(files))
    sampled = [files[at * len(files) // count] for at in range(count)]
    found = [_estimate(file, section) for file in sampled]
    scale = sum(file.info.size or 0 for file in files) / max(1, sum(file.info.size or 0 for file in sampled))
    return round(scale * sum(rows for rows, _ in found)), round(scale * sum(size for _, size in found))


def _estimate(file: CorpusFile, section: CorpusSection) -> tuple[float, float]:
    """Rows and bytes of one file, from a Parquet footer or the first MiB; none of a file that cannot be read."""
    if file.format == "parquet":
        units = inspect_range(file, section.model_copy(update={"id": None})).documents
        return sum(units.column("num_rows").to_pylist()), sum(units.column("bytes").to_pylist())
    if file.format == "txt":
        return 1.0, float(file.info.size or 0)
    head, scale = head_of(file)
    rows = sum(1 for _ in lines_of(io.BytesIO(head))) - (file.format == "csv")
    try:
        columns = columns_in(head, file)
    except pa.ArrowInvalid:  # damage
        return 0.0, 0.0
    if columns:
        check_columns(file, section, columns)
    return max(rows, 0) * scale, len(head) * scale
