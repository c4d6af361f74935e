"""Lazy Polars frames over the tables of a run. Nothing is read before a query asks for it, and then only its columns."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from polars.io.plugins import register_io_source

from finescope import schemas, storage
from finescope.errors import UserError
from finescope.manifest import Manifest, read_manifest, require_run

# Schema, and the steps that write it. `control_` before a name of teach's or distill's is the same of the control.
_TABLES: dict[str, tuple[pa.Schema, tuple[str, ...]]] = {
    "documents": (schemas.DOCUMENTS, ("index",)),
    "latents": (schemas.LATENTS, ("sae",)),
    "screened": (schemas.SCREENED, ("screen",)),
    "sampled": (schemas.EMBEDDINGS, ("screen",)),
    "audited": (schemas.EMBEDDINGS, ("screen",)),
    "embeddings": (schemas.EMBEDDINGS, ("embed",)),
    "scores": (schemas.SCORES, ("score",)),
    "curated": (pa.schema([*schemas.CURATED_HEAD, *schemas.CURATED_TAIL]), ("curate",)),
    "rejects": (schemas.REJECTS, ("index", "screen", "embed", "curate")),
    "rewrites": (schemas.REWRITES, ("teach",)),
    "teacher_logprobs": (schemas.TEACHER_LOGPROBS, ("teach",)),
    "importance": (schemas.IMPORTANCE, ("prune",)),
    "head_latents": (schemas.HEAD_LATENTS, ("prune",)),
    "metrics": (schemas.METRICS, ("sae", "distill", "evaluate")),
}
# Rows that a file system which is not local gives Polars at a time.
_BATCH_ROWS = 131_072


def manifests_of(output: str) -> dict[str, Manifest]:
    """The manifests of a run's done steps, in the order in which they were begun.

    Raises:
        UserError: there is no run at `output`.
    """
    found = {name: read_manifest(storage.join(output, state.path)) for name, state in require_run(output).steps.items()}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def table(run: str, name: str, step: str | None = None) -> pl.LazyFrame:
    """Table `name` of the run at `run` (a directory or a URI), with the columns of its pinned schema, in its order.

    Args:
        step: of this step alone; None: of all that are done, one below the other (`rejects` and `metrics` have several).

    Raises:
        UserError: there is no run or no such table, or the step that writes it is not done; the message says which.
    """
    if name.removeprefix("control_") not in _TABLES:
        raise UserError(f"no table is called '{name}'; the tables: {', '.join(_TABLES)}")
    manifests = manifests_of(run)
    found = {key: manifest for key, manifest in manifests.items() if name in manifest.tables and step in (None, key)}
    if not found:
        raise UserError(_missing(run, name, step, manifests))
    return frames_of(found, name)


def _missing(run: str, name: str, step: str | None, manifests: Mapping[str, Manifest]) -> str:
    if step is not None and step in manifests:
        known = ", ".join(manifests[step].tables) or "none"
        return f"step '{step}' of the run at '{run}' has no table '{name}'; its tables: {known}"
    writer = step or _TABLES[name.removeprefix("control_")][1][0]
    return f"the run at '{run}' has no table '{name}': step '{writer}' is not done; `finescope run RECIPE --until {writer}`"


def tables_of(output: str) -> dict[str, tuple[str, ...]]:
    """The tables of a run and the steps that wrote each, in order: `rejects` and `metrics` come from several.

    Raises:
        UserError: there is no run at `output`.
    """
    found: dict[str, tuple[str, ...]] = {}
    for step, manifest in manifests_of(output).items():
        for name in manifest.tables:
            found[name] = (*found.get(name, ()), step)
    return found


def frame_of(manifest: Manifest, name: str) -> pl.LazyFrame:
    """Table `name` of one step; a table without files has the columns of its schema and no row."""
    files = manifest.files(name)
    if not files:
        return _empty(name)
    return _pinned(scan(files), name)


def sample_of(manifest: Manifest, name: str, files: int, rows: int) -> pl.LazyFrame:
    """The first `rows` of each of `files` files of a table, evenly spaced: a look at a table of any size. All of a small one."""
    there = manifest.files(name)
    chosen = [there[at * len(there) // files] for at in range(files)] if len(there) > files else list(there)
    return _pinned(pl.concat([scan([file]).head(rows) for file in chosen]), name) if chosen else _empty(name)


def scan(files: Sequence[str]) -> pl.LazyFrame:
    """Parquet files of one schema wherever they are, at least one."""
    if all(storage.is_local(file) for file in files):
        # A file is meant as it is named, whatever `[` or `*` there is in the path to it.
        return pl.scan_parquet([storage.absolute(file) for file in files], glob=False)
    # Polars opens object stores with credentials of its own and knows no memory://; these go the way of all other files.
    with storage.open_input(files[0]) as file:
        schema = pq.read_schema(file)
    return register_io_source(functools.partial(_batches, tuple(files), schema), schema=_polars(schema).schema)


def _batches(
    files: tuple[str, ...],
    schema: pa.Schema,
    with_columns: list[str] | None,
    predicate: pl.Expr | None,
    n_rows: int | None,
    batch_size: int | None,
) -> Iterator[pl.DataFrame]:
    """The source behind a scan: a few files are read ahead, and no more than some batches are held."""
    opened = [storage.filesystem(file) for file in files]
    dataset = ds.dataset([path for _, path in opened], schema=schema, filesystem=opened[0][0], format="parquet")
    left = n_rows
    for batch in dataset.to_batches(columns=with_columns, batch_size=batch_size or _BATCH_ROWS):
        frame = _polars(batch)
        if left is not None:
            frame = frame.head(left)
            left -= frame.height
        yield frame if predicate is None else frame.filter(predicate)
        if left == 0:
            return


def frames_of(manifests: Mapping[str, Manifest], name: str) -> pl.LazyFrame:
    """Table `name` of all steps that have it, one below the other; without rows where none has."""
    frames = [frame_of(manifest, name) for manifest in manifests.values() if name in manifest.tables]
    return pl.concat(frames, how="diagonal_relaxed") if frames else _empty(name)


def corpus_sources(manifests: Mapping[str, Manifest]) -> dict[str, int]:
    """Documents of the whole corpus by `source`, where that is known without reading the corpus again; else empty.

    It is a fact of `index` (`sources`), or of the record of a corpus that finescope itself prepared beside the run.
    """
    if "index" not in manifests:
        return {}
    index = manifests["index"]
    if "sources" in index.facts:
        return dict(index.facts["sources"])
    prepared = storage.join(index.uri.rstrip("/").rsplit("/", 1)[0], "inputs", "prepared.json")
    return dict(storage.read_json(prepared)["by_package"]) if storage.exists(prepared) else {}


def _schema(name: str) -> pa.Schema:
    return _TABLES[name.removeprefix("control_")][0]


def _pinned(frame: pl.LazyFrame, name: str) -> pl.LazyFrame:
    """The columns of a table's schema, in its order. One that is younger than the table is null."""
    if name == "curated":  # has the source's columns too
        return frame
    schema, there = _empty(name).collect_schema(), frame.collect_schema()
    return frame.select(pl.col(key) if key in there else pl.lit(None, kind).alias(key) for key, kind in schema.items())


def _empty(name: str) -> pl.LazyFrame:
    return _polars(_schema(name)).lazy()


def _polars(data: pa.Schema | pa.RecordBatch) -> pl.DataFrame:
    frame = pl.from_arrow(data.empty_table() if isinstance(data, pa.Schema) else data)
    assert isinstance(frame, pl.DataFrame)
    return frame
