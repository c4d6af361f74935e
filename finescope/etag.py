"""A tag that changes when a file does, from what its store tells of it."""

import datetime
import hashlib
from collections.abc import Mapping
from typing import Any

# What stores call the tag of a file's contents, and the time of its last change, in order of trust.
_TAGS = ("ETag", "etag", "md5Hash", "blob_id")
_TIMES = ("mtime", "LastModified", "last_modified", "created")


def etag_of(entry: Mapping[str, Any]) -> str:
    """The store's own tag, or a hash of size and modification time. `entry` is fsspec's account of one file.

    Some stores tell a time as a number in a listing and as a date of a single file: both give the same tag.
    """
    tag = next((entry[key] for key in _TAGS if entry.get(key)), None)
    if tag is not None:
        return str(tag).strip('"')
    time = next((entry[key] for key in _TIMES if entry.get(key) is not None), None)
    seconds = time.timestamp() if isinstance(time, datetime.datetime) else time
    moment = round(seconds * 1e6) if isinstance(seconds, int | float) else seconds
    return hashlib.sha256(f"{entry['size']}:{moment}".encode()).hexdigest()[:16]
