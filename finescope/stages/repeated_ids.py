"""Ids that stand more than once, found exactly and out of core: 10^9 ids need disk, not memory."""

from pathlib import Path

import polars as pl

from finescope import directories, storage
from finescope.analysis.frames import scan

# Ids that are grouped in memory at a time, some 100 bytes each.
_IDS_AT_ONCE = 5_000_000
_EXAMPLES = 3


def repeated_ids(directory: str, at_once: int = _IDS_AT_ONCE) -> tuple[int, list[tuple[str, int]]]:
    """How many of the ids in Parquet files (`id`) below `directory` stand more than once, and (id, times) of the first three.

    More than `at_once` ids are first written apart by a hash, on this machine's disk.
    """
    files = [storage.join(directory, name) for name in storage.list_names(directory)]
    if not files:
        return 0, []
    ids = scan(files)
    parts = -(-int(ids.select(pl.len()).collect().item()) // at_once)
    if parts <= 1:
        return _repeated([ids])
    with directories.scratch_directory(directory) as folder:
        key = (pl.col("id").hash() % parts).alias("part")
        ids.sink_parquet(pl.PartitionBy(folder, key=key, include_key=False), mkdir=True)
        return _repeated([scan(part) for part in _parts(folder)])


def _parts(folder: Path) -> list[list[str]]:
    """The files of each part."""
    return [sorted(map(str, part.rglob("*.parquet"))) for part in sorted(folder.iterdir()) if part.is_dir()]


def _repeated(parts: list[pl.LazyFrame]) -> tuple[int, list[tuple[str, int]]]:
    count, first = 0, pl.DataFrame(schema={"id": pl.String, "times": pl.UInt32})
    for part in parts:
        twice = part.group_by("id").agg(pl.len().alias("times")).filter(pl.col("times") > 1).collect()
        count += twice.height
        first = pl.concat([first, twice.cast({"times": pl.UInt32})]).sort("id").head(_EXAMPLES)
    return count, first.rows()
