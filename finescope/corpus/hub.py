"""Datasets on the Hugging Face hub: a name and a branch become the files of one commit, which never change."""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import unquote

from fsspec.core import has_magic
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from finescope.errors import CorpusError

_SCHEME = "hf://datasets/"
# A branch whose name has a slash is one of the hub's own, or is written with %2F.
_URI = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:convert/[\w.-]+|pr/\d+)|[^/@]+))?(?:/(?P<path>.*))?"
)
_COMMIT = re.compile(r"(?P<commit>hf://datasets/[^@]+@[0-9a-f]{40})/")
_EXPECTED = "expected hf://datasets/OWNER/NAME[@REVISION][/PATH]"
# Where the hub puts a dataset that it has converted: CONFIG/SPLIT/0000.parquet, partial-SPLIT of one that it has begun only.
_CONVERSION = "refs/convert/parquet"
_PARTIAL = "partial-"
# What carries the hub's requests, in this version of its client or another.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2")

_log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """What a URI names."""

    uri: str
    name: str  # OWNER/NAME
    revision: str | None
    path: str  # in the repository, may be a glob; "" for all of it
    field: str  # of the recipe

    def error(self, problem: str) -> CorpusError:
        return CorpusError(f"{self.field}: '{self.uri}': {problem}")


def is_dataset(uri: str) -> bool:
    """Whether `uri` is of a dataset on the hub."""
    return uri.startswith(_SCHEME)


def pinned(uri: str, format: str, field: str) -> str:
    """A pattern for `storage.glob` of what `hf://datasets/OWNER/NAME[@REVISION][/PATH]` names now, at its commit.

    PATH is a glob, a file or a directory of the repository. Without PATH the Parquet files of the repository are meant. Where
    there are none, or PATH is not there, it is the hub's own conversion to Parquet, PATH then being CONFIG or CONFIG/SPLIT.
    `@~parquet` is the branch of that conversion.

    Args:
        format: of the recipe; where it is neither "auto" nor "parquet", the files of the repository itself are meant.
        field: of the recipe, for messages.

    Raises:
        CorpusError: there is no such repository, revision or path, it may not be read, or the hub cannot be reached.
    """
    match = _URI.fullmatch(uri.replace("@~parquet", f"@{_CONVERSION}", 1))
    if match is None:
        raise CorpusError(f"{field}: '{uri}': {_EXPECTED}")
    revision = match["revision"] and unquote(match["revision"])
    place = _Place(uri, match["name"], revision, (match["path"] or "").strip("/"), field)
    with _told(place):
        api = HfApi()
        # A gated repository shows its files to everybody and gives them to few.
        api.auth_check(place.name, repo_type="dataset")
        commit = _commit(api, place, place.revision)
        root = f"{_SCHEME}{place.name}@{commit}"
        if has_magic(place.path):
            return f"{root}/{place.path}"
        if place.path:
            if api.get_paths_info(place.name, place.path, revision=commit, repo_type="dataset"):
                return f"{root}/{place.path}"
        elif format not in ("auto", "parquet"):
            return root
        elif place.revision != _CONVERSION and any(map(_is_parquet, _names(api, place, commit))):
            return f"{root}/**/*.parquet"
        return _conversion(api, place)


def commits_of(uris: Iterable[str]) -> list[str]:
    """The commits, hf://datasets/OWNER/NAME@COMMIT, that files are of, each once; none of files that are elsewhere."""
    return list(dict.fromkeys(match["commit"] for uri in uris if (match := _COMMIT.match(uri))))


def _conversion(api: HfApi, place: _Place) -> str:
    missing = f"no '{place.path}' in the repository" if place.path else "no Parquet file in the repository"
    # Only the default branch is converted.
    if place.revision not in (None, constants.DEFAULT_REVISION, _CONVERSION):
        raise place.error(f"{missing} at '{place.revision}'")
    try:
        commit = _commit(api, place, _CONVERSION)
    except RevisionNotFoundError:
        raise place.error(f"{missing}, and the hub has not converted it to Parquet; name its files by a glob") from None
    folders = sorted({name.rpartition("/")[0] for name in _names(api, place, commit) if _is_parquet(name)})
    config, _, split = place.path.partition("/")
    wanted = (place.path, f"{config}/{_PARTIAL}{split}") if split else (place.path,)
    below = {path: [folder for folder in folders if f"{folder}/".startswith(f"{path}/" if path else "")] for path in wanted}
    path = next((path for path in wanted if below[path]), None)
    if path is None:
        known = ", ".join(folder.replace(_PARTIAL, "") for folder in folders) or "nothing"
        raise place.error(f"{missing}, and its conversion to Parquet has: {known}")
    partial = [folder for folder in below[path] if f"/{_PARTIAL}" in f"/{folder}"]
    if partial:
        _log.warning("%s: '%s': the hub has converted only the first part of: %s", place.field, place.uri, ", ".join(partial))
    return f"{_SCHEME}{place.name}@{commit}/{f'{path}/' if path else ''}**/*.parquet"


def _commit(api: HfApi, place: _Place, revision: str | None) -> str:
    commit = api.dataset_info(place.name, revision=revision, expand=["sha"]).sha
    assert commit is not None, place
    return commit


def _names(api: HfApi, place: _Place, commit: str) -> Iterator[str]:
    """The files of a commit and its folders, a page after the other."""
    for entry in api.list_repo_tree(place.name, recursive=True, revision=commit, repo_type="dataset"):
        yield entry.path


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet")


@contextlib.contextmanager
def _told(place: _Place) -> Iterator[None]:
    """Tell what the hub's client raises as an error of the recipe's, in one line, with what can be done."""
    try:
        yield
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/datasets/{place.name}"
        raise place.error(f"the dataset is gated: accept its terms at {page} and set HF_TOKEN to your token") from error
    except RepositoryNotFoundError as error:
        raise place.error("the hub has no such dataset, or it is private and HF_TOKEN is not the token of a reader") from error
    except RevisionNotFoundError as error:
        raise place.error(f"the dataset has no revision '{place.revision}'") from error
    except HFValidationError as error:
        raise place.error(f"{_EXPECTED}: {_line(error)}") from error
    except OfflineModeIsEnabled as error:
        raise place.error("HF_HUB_OFFLINE is set, and the hub must be asked for the files") from error
    except HfHubHTTPError as error:
        raise place.error(f"the hub at {constants.ENDPOINT}, asked with HF_TOKEN, refused: {_line(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _TRANSPORTS:
            raise
        raise place.error(f"the hub at {constants.ENDPOINT} (HF_ENDPOINT) cannot be reached: {_line(error)}") from error


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
