"""Which files a corpus is made of, and what is in each: by extension, or as the recipe says."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finescope import storage
from finescope.config import CorpusSection
from finescope.corpus import hub
from finescope.errors import CorpusError
from finescope.storage import FileInfo

Format = Literal["parquet", "jsonl", "csv", "txt"]
Compression = Literal["gzip", "zstd"]

_FORMATS: dict[str, Format] = {
    "parquet": "parquet",
    "pq": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "jsonlines": "jsonl",
    "json-lines": "jsonl",
    "csv": "csv",
    "txt": "txt",
}
_COMPRESSIONS: dict[str, Compression] = {"gz": "gzip", "zst": "zstd"}
_KNOWN = "known: .parquet, .jsonl, .ndjson, .csv, .txt; all but Parquet also with .gz or .zst behind"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus as it was when it was listed, and how to read it."""

    info: FileInfo
    format: Format
    compression: Compression | None


def resolve(section: CorpusSection) -> list[CorpusFile]:
    """The corpus's files: in the order of the recipe's patterns, sorted by path within each, each file once.

    Raises:
        CorpusError: a pattern matches nothing, or a file's extension says no format and the recipe does not either.
    """
    return resolve_paths(section.path, section.format, "corpus.path")


def resolve_paths(patterns: Sequence[str], format: str, field: str) -> list[CorpusFile]:
    """As `resolve`, for the recipe's field `field`; `format` is a Format or "auto".

    In a directory with format "auto" files of other kinds (a README, a licence) are left out, with a warning. What is on the
    Hugging Face hub is listed at the commit that it has now (`hub.pinned`).
    """
    files: dict[str, CorpusFile] = {}
    for pattern in patterns:
        place = hub.pinned(pattern, format, field) if hub.is_dataset(pattern) else pattern
        found = storage.glob(place)
        if not found:
            raise CorpusError(f"{field}: no file matches '{pattern}'")
        if format == "auto" and _is_directory(place):
            found = _data_files(found, pattern, field)
        for info in found:
            files.setdefault(info.path, CorpusFile(info, *format_of(info.path, format, field)))
    return list(files.values())


def format_of(path: str, format: str, field: str = "corpus.path") -> tuple[Format, Compression | None]:
    """Format and compression of a file; a `format` other than "auto" overrules the extension, not the compression.

    Raises:
        CorpusError: the extension is not known.
    """
    name, compression = _split_compression(path.rsplit("/", 1)[-1])
    extension = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    kind = _FORMATS.get(extension) if format == "auto" else _FORMATS[format]
    if kind is None:
        raise CorpusError(f"{field}: what is in '{path}' cannot be told from its name ({_KNOWN}); or give corpus.format")
    if kind == "parquet" and compression is not None:
        raise CorpusError(f"{field}: '{path}' is Parquet inside {compression}, which cannot be read by row group; unpack it")
    return kind, compression


def common_directory(files: Sequence[CorpusFile]) -> str:
    """The files' longest common directory with its slash, so that names below it do not depend on where the corpus lies."""
    if not files:
        return ""
    # What the first and the last in alphabetical order have in common, all have.
    first, last = min(file.info.path for file in files), max(file.info.path for file in files)
    common = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: first.rfind("/", 0, common) + 1]


def _split_compression(name: str) -> tuple[str, Compression | None]:
    stem, _, extension = name.rpartition(".")
    compression = _COMPRESSIONS.get(extension.lower()) if stem else None
    return (stem, compression) if compression else (name, None)


def _is_directory(pattern: str) -> bool:
    if any(char in pattern for char in "*?["):
        return False
    fs, path = storage.filesystem(pattern)
    return bool(fs.isdir(path))


def _data_files(found: list[FileInfo], directory: str, field: str) -> list[FileInfo]:
    data = [info for info in found if _split_compression(info.path)[0].rsplit(".", 1)[-1].lower() in _FORMATS]
    if not data:
        raise CorpusError(f"{field}: no file in '{directory}' has an extension that says its format ({_KNOWN})")
    others = [info.path for info in found if info not in data]
    if others:
        _log.warning("%s: %d files of '%s' are not data and left out: %s", field, len(others), directory, ", ".join(others[:5]))
    return data
