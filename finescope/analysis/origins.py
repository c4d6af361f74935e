"""Where the curated documents are from in the corpus: by its column `source`, or by file; and their texts, by place."""

from collections.abc import Mapping, Sequence

import polars as pl
from pydantic import ValidationError

from finescope.analysis import summaries
from finescope.analysis.frames import corpus_sources, frame_of
from finescope.config import CorpusSection
from finescope.corpus.documents import read_selected
from finescope.corpus.shapes import shaped_as_indexed
from finescope.errors import CorpusError
from finescope.manifest import Manifest


def shares(manifests: Mapping[str, Manifest]) -> pl.DataFrame:
    """Documents of the curated set by source, as `summaries.sources` has them; by file where the corpus names no source.

    Without rows where there is no curated set, and where all of it is of one file.
    """
    if "curate" not in manifests:
        return summaries.sources(pl.LazyFrame({"text": []}), {})
    curated = frame_of(manifests["curate"], "curated")
    by_source = summaries.sources(curated, corpus_sources(manifests))
    if by_source.height or not {"index", "score"} <= manifests.keys():
        return by_source
    sizes = _rows_by_file(manifests["index"])
    if sum(rows > 0 for rows in sizes.values()) < 2:
        return by_source
    directory = manifests["index"].facts.get("directory", "")
    names = {file: file.removeprefix(directory) for file in sizes}
    numbered = {"file": range(len(sizes)), "source": list(names.values())}
    files = pl.DataFrame(numbered, schema_overrides={"file": pl.Int32})
    located = summaries.scores_of(frame_of(manifests["score"], "scores"), curated).join(files.lazy(), on="file", how="left")
    return summaries.sources(located, {names[file]: rows for file, rows in sizes.items() if rows})


def _rows_by_file(index: Manifest) -> dict[str, int]:
    """How many rows of each file, in order, are read: with `corpus.limit` those of the first units, up to it."""
    sizes: dict[str, int] = {}
    left = index.section.get("limit")
    for file, rows in frame_of(index, "documents").select("file", "num_rows").collect().iter_rows():
        read = rows if left is None else min(left, rows)
        left = None if left is None else left - read
        sizes[file] = sizes.get(file, 0) + read
    return sizes


def texts(manifests: Mapping[str, Manifest], places: pl.DataFrame) -> list[str | None]:
    """The texts of some documents (columns file, row_group, row), read again from the corpus.

    None for a document whose file is gone, has changed or cannot be reached, and for one of messages, which only the
    model's tokenizer makes a text of.
    """
    index = manifests["index"]
    try:
        section = shaped_as_indexed(CorpusSection.model_validate(index.section), index.facts)
    except ValidationError:  # of another version of finescope
        return [None] * places.height
    if section.messages is not None:
        return [None] * places.height
    units = frame_of(index, "documents").collect().to_dicts()
    numbers = {file: number for number, file in enumerate(dict.fromkeys(unit["file"] for unit in units))}
    by_place = {(numbers[unit["file"]], unit["row_group"]): unit for unit in units}
    found: dict[tuple[int, int, int], str | None] = {}
    for key, rows in places.select("file", "row_group", "row").group_by("file", "row_group"):
        file, row_group = int(key[0]), int(key[1])
        wanted = sorted(set(rows["row"].to_list()))
        for row, text in zip(wanted, _read(by_place.get((file, row_group)), wanted, section), strict=True):
            found[file, row_group, row] = text
    return [found[place] for place in places.select("file", "row_group", "row").iter_rows()]


def _read(unit: dict[str, object] | None, rows: Sequence[int], section: CorpusSection) -> list[str | None]:
    if unit is None:
        return [None] * len(rows)
    try:
        return read_selected(unit, rows, section, None).column("text").to_pylist()
    except (CorpusError, OSError):
        return [None] * len(rows)
