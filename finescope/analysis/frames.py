"""Lazy Polars frames over the tables of a run. Nothing is read before a query asks for it, and then only its columns."""

from collections.abc import Mapping, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds

from finescope import schemas, storage
from finescope.errors import UserError
from finescope.manifest import Manifest, manifest_of, read_manifest, require_run

_SCHEMAS = {
    "documents": schemas.DOCUMENTS,
    "embeddings": schemas.EMBEDDINGS,
    "latents": schemas.LATENTS,
    "scores": schemas.SCORES,
    "curated": pa.schema([*schemas.CURATED_HEAD, *schemas.CURATED_TAIL]),
    "rejects": schemas.REJECTS,
    "importance": schemas.IMPORTANCE,
    "rewrites": schemas.REWRITES,
    "metrics": schemas.METRICS,
}


def manifests_of(output: str) -> dict[str, Manifest]:
    """The manifests of a run's done steps, in the order in which they were begun.

    Raises:
        UserError: there is no run at `output`.
    """
    found = {name: read_manifest(storage.join(output, state.path)) for name, state in require_run(output).steps.items()}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def table(output: str, step: str, name: str) -> pl.LazyFrame:
    """Table `name` that a done step of the run at `output` wrote.

    Raises:
        UserError: there is no such run, the step is not done, or it has no such table.
    """
    manifest = manifest_of(output, step)
    if name not in manifest.tables:
        known = ", ".join(manifest.tables) or "none"
        raise UserError(f"step '{step}' of the run at '{output}' has no table '{name}'; its tables: {known}")
    return frame_of(manifest, name)


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
    return scan(files) if files else _empty(name)


def scan(files: Sequence[str]) -> pl.LazyFrame:
    """Parquet files wherever they are, at least one."""
    if all(storage.is_local(file) for file in files):
        return pl.scan_parquet([storage.absolute(file) for file in files])
    # Polars opens object stores with credentials of its own and knows no memory://; these go the way of all other files.
    opened = [storage.filesystem(file) for file in files]
    return pl.scan_pyarrow_dataset(ds.dataset([path for _, path in opened], filesystem=opened[0][0], format="parquet"))


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


def _empty(name: str) -> pl.LazyFrame:
    frame = pl.from_arrow(_SCHEMAS[name.removeprefix("control_")].empty_table())
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy()
