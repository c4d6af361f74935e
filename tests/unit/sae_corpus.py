"""The tiny run's model and corpus as the step `sae` sees them."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from finescope import storage
from finescope.config import ModelSection
from finescope.models.load import ModelReference, materialise
from finescope.models.source import resolve


def reference_of_tiny(root: Path) -> ModelReference:
    section = ModelSection.model_validate({"path": str(root / "model"), "dtype": "float32"})
    return materialise(resolve(section, "model.path"), section, str(root / "unused"))


def units_of_tiny(root: Path) -> list[dict[str, Any]]:
    """A unit a row group, as `limited_units` gives them."""
    units = []
    for file in sorted((root / "corpus").glob("*.parquet")):
        footer = pq.ParquetFile(file).metadata
        for row_group in range(footer.num_row_groups):
            rows = footer.row_group(row_group).num_rows
            etag = storage.info(str(file)).etag
            place = {"file": str(file), "etag": etag, "row_group": row_group, "num_rows": rows, "take": rows, "name": file.name}
            units.append({"unit": len(units), "start": None, **place})
    return units
