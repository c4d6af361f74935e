import datetime

import pytest

from finescope.etag import etag_of

_WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)


@pytest.mark.parametrize("name", ["ETag", "etag", "md5Hash", "blob_id"])
def test_the_stores_own_tag_counts(name: str):
    assert etag_of({"size": 3, name: '"abc"', "mtime": 7.0}) == "abc"


def test_an_empty_tag_is_none():
    assert etag_of({"size": 3, "etag": None, "ETag": "", "mtime": 7.0}) == etag_of({"size": 3, "mtime": 7.0})


def test_a_date_and_its_number_are_the_same():
    assert etag_of({"size": 3, "created": _WHEN}) == etag_of({"size": 3, "created": _WHEN.timestamp()})


def test_size_and_time_count():
    entries = [{"size": 3, "mtime": 7.0}, {"size": 4, "mtime": 7.0}, {"size": 3, "mtime": 8.0}, {"size": 3, "mtime": 7.000002}]
    entries += [{"size": 3, "mtime": 0.0, "created": 7.5}, {"size": 3}, {"size": 3, "last_modified": "Mon"}]
    assert len({etag_of(entry) for entry in entries}) == len(entries)
    assert etag_of({"size": 3, "mtime": 0.0, "created": 1.0}) == etag_of({"size": 3, "mtime": 0.0, "created": 2.0})
