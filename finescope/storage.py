"""The only code that touches a file system. Every path is an fsspec URI or a local path.

A file appears whole or not at all: local files are written beside their place, synced and renamed; object stores
publish an object when its upload ends.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from finescope.errors import CorpusError, ResourceError
from finescope.etag import etag_of

_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
# Written beside a file while it is being made; no reader ever lists names that begin so.
TEMPORARY_PREFIX = ".tmp-"
_MAGIC = re.compile(r"[*?\[]")
# A file of a commit on the Hugging Face hub. It never changes, and to ask anew means to list its directory.
_OF_COMMIT = re.compile(r"hf://[^@]+@[0-9a-f]{40}/")


@dataclass(frozen=True)
class FileInfo:
    """A file as it was when it was looked at."""

    path: str
    size: int | None  # bytes; None: the server does not tell, which is not an empty file
    etag: str  # the store's own tag, or a hash of size and modification time


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `uri` and the path inside it.

    Raises:
        ResourceError: the protocol is unknown, or the package that serves it is not installed.
    """
    protocol = uri.split("://", 1)[0] if "://" in uri else "file"
    try:
        fs, path = fsspec.url_to_fs(uri)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        hint = f"pip install 'finescope[{extra}]'" if extra else str(error)
        raise ResourceError(f"cannot open '{uri}': the file system '{protocol}' is not installed; {hint}") from error
    except ValueError as error:
        raise ResourceError(f"cannot open '{uri}': {error}") from error
    return fs, path


def is_local(uri: str) -> bool:
    """Whether `uri` is on this machine's file system."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it."""
    below = "/".join(part.strip("/") for part in parts)
    return uri + below if uri.endswith("://") else f"{uri.rstrip('/')}/{below}"


def absolute(uri: str) -> str:
    """A URI that means the same in every process: local paths become absolute."""
    return filesystem(uri)[1] if is_local(uri) else uri


def exists(uri: str) -> bool:
    """Whether a file or directory is there."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def info(uri: str) -> FileInfo:
    """Size and etag of one file as it is now; `glob` tells the same.

    Raises:
        FileNotFoundError: it is not there.
    """
    fs, path = filesystem(uri)
    if not _OF_COMMIT.match(uri):
        fs.invalidate_cache(path)
    return _file_info(fs, uri, fs.info(path))


def glob(pattern: str) -> list[FileInfo]:
    """The files that match a glob, or all files below a directory, sorted by path. Hidden ones (`.` or `_` before the
    name of a file or of a directory on the way to it) are left out; a file that is named in full is not hidden."""
    fs, path = filesystem(pattern)
    fs.invalidate_cache()
    root = path
    if _MAGIC.search(path):
        found = fs.glob(path, detail=True)
        root = _MAGIC.split(path, maxsplit=1)[0].rpartition("/")[0]
    elif fs.isdir(path):
        found = fs.find(path, detail=True)
    else:
        found = {path: fs.info(path)} if fs.exists(path) else {}
    entries = cast(dict[str, dict[str, Any]], found)
    names = [name for name, entry in entries.items() if entry["type"] == "file" and not _hidden(name.removeprefix(root))]
    local = isinstance(fs, LocalFileSystem)
    return [_file_info(fs, name if local else str(fs.unstrip_protocol(name)), entries[name]) for name in sorted(names)]


def list_names(directory: str) -> list[str]:
    """Names of the files directly in a directory, sorted; empty where there is none."""
    fs, path = filesystem(directory)
    fs.invalidate_cache(path)
    if not fs.isdir(path):
        return []
    names = [str(entry["name"]).rsplit("/", 1)[-1] for entry in fs.ls(path, detail=True) if entry["type"] == "file"]
    return sorted(name for name in names if not name.startswith("."))


@contextlib.contextmanager
def open_input(uri: str) -> Iterator[BinaryIO]:
    """A file for reading bytes."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        yield cast(BinaryIO, file)


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole file, or its bytes from `start` up to `end` and no others, even of an HTTP server that knows no ranges."""
    fs, path = filesystem(uri)
    data = b"" if start is not None and start == end else cast(bytes, fs.cat_file(path, start=start, end=end))
    return data[start:end] if start is not None and end is not None and len(data) > end - start else data


def put_bytes(uri: str, data: bytes) -> None:
    """Write a file so that it is there whole, on disk, or not at all."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the table, not in it: a table's directory holds nothing but whole Parquet files, even after a crash.
    beside = target.parent.parent if target.suffix == ".parquet" else target.parent
    temporary = beside / f"{TEMPORARY_PREFIX}{target.name}-{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def read_json(uri: str) -> Any:
    """The parsed JSON file."""
    return json.loads(read_bytes(uri))


def put_json(uri: str, value: Any) -> None:
    """Write JSON, indented, atomically."""
    put_bytes(uri, (json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False) + "\n").encode())


def put_jsonl(uri: str, rows: Iterable[Mapping[str, float | None]]) -> None:
    """Write rows of numbers as JSON lines, all of them at once, atomically; JSON has no number for NaN and infinities: null."""
    finite = ({name: value if value is None or math.isfinite(value) else None for name, value in row.items()} for row in rows)
    put_bytes(uri, "".join(json.dumps(row) + "\n" for row in finite).encode())


def put_parquet(uri: str, table: pa.Table, row_group_size: int | None = None) -> int:
    """Write one Parquet file (zstd) atomically; returns its bytes. The table is encoded in memory first."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=row_group_size)
    data = buffer.getvalue()
    put_bytes(uri, data)
    return len(data)


def read_parquet(uri: str, columns: list[str] | None = None) -> pa.Table:
    """The whole Parquet file, or some of its columns."""
    with open_input(uri) as file:
        return pq.ParquetFile(file).read(columns=columns)


def delete(uri: str) -> None:
    """Remove a file or a directory with all it holds, where it is there."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def free_bytes(uri: str) -> int | None:
    """Bytes free where `uri` is, or will be; None where the store has no such limit."""
    if not is_local(uri):
        return None
    path = Path(filesystem(uri)[1])
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_unchanged(uri: str, etag: str) -> None:
    """Hold a file to the etag that the index recorded.

    Raises:
        CorpusError: it is gone or has changed since.
    """
    try:
        now = info(uri)
    except FileNotFoundError:
        raise CorpusError(f"'{uri}' was there when the corpus was indexed and is gone") from None
    if now.etag != etag:
        raise CorpusError(f"'{uri}' has changed since the corpus was indexed; give the changed corpus a new output")


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _file_info(fs: AbstractFileSystem, uri: str, entry: dict[str, Any]) -> FileInfo:
    return FileInfo(uri, None if entry["size"] is None else int(entry["size"]), etag_of(entry))


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
