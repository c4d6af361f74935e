import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from finescope import directories, storage
from finescope.errors import CorpusError, ResourceError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place on disk, and one in memory (its own for each test)."""
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.as_posix().strip('/')}"


def files_below(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def tails(found: list[storage.FileInfo], root: str) -> list[str]:
    inside = storage.filesystem(root)[1]
    return [storage.filesystem(file.path)[1].removeprefix(inside + "/") for file in found]


def test_put_and_read(root: str):
    path = storage.join(root, "deep", "a.json")
    assert not storage.exists(path)
    storage.put_json(path, {"name": "é", "values": [1, 2]})
    storage.put_json(path, {"name": "é"})
    assert storage.read_json(path) == {"name": "é"}
    assert storage.read_bytes(path).decode() == '{\n  "name": "é"\n}\n'
    table = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})
    size = storage.put_parquet(storage.join(root, "t.parquet"), table, row_group_size=2)
    assert size == storage.info(storage.join(root, "t.parquet")).size
    assert storage.read_parquet(storage.join(root, "t.parquet")).equals(table)
    assert storage.read_parquet(storage.join(root, "t.parquet"), ["b"]).column_names == ["b"]


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("/a/", ("b", "c"), "/a/b/c"),
        ("s3://bucket/a", ("/b/",), "s3://bucket/a/b"),
        ("memory://", ("a",), "memory://a"),
        ("/", ("a",), "/a"),
    ],
)
def test_join(uri: str, parts: tuple[str, ...], expected: str):
    assert storage.join(uri, *parts) == expected


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("name", ["run.json", "embeddings/part-000000.parquet"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, name: str
):
    path = str(tmp_path / "step" / name)
    storage.put_bytes(path, b"old")
    monkeypatch.setattr(os, call, _no_space)
    with pytest.raises(OSError, match="No space left"):
        storage.put_bytes(path, b"new")
    assert storage.read_bytes(path) == b"old"
    assert files_below(tmp_path) == [f"step/{name}"]


def test_a_killed_write_leaves_nothing_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill leaves the temporary file where it is: beside the table's directory, never in it."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    step = tmp_path / "step"
    storage.put_bytes(str(step / "embeddings" / "part-0.parquet"), b"whole")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        for name in ("embeddings/part-1.parquet", "manifest.json"):
            with pytest.raises(KeyboardInterrupt):
                storage.put_bytes(str(step / name), b"half")
    assert files_below(step / "embeddings") == ["part-0.parquet"]
    left = [file for file in files_below(step) if Path(file).name.startswith(storage.TEMPORARY_PREFIX)]
    assert len(left) == 2
    (step / "model" / f"{storage.TEMPORARY_PREFIX}tree" / "deep").mkdir(parents=True)
    directories.delete_temporaries(str(step))
    assert files_below(step) == ["embeddings/part-0.parquet"]
    assert list((step / "model").iterdir()) == []


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def recorded(name: str, call: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: (calls.append(name), call(*arguments))[1]

    monkeypatch.setattr(os, "fsync", recorded("sync", os.fsync))
    monkeypatch.setattr(os, "replace", recorded("rename", os.replace))
    storage.put_bytes(str(tmp_path / "a"), b"1")
    assert calls == ["sync", "rename", "sync"], "the file, its name, the directory that holds the name"


def test_delete(root: str):
    storage.put_bytes(storage.join(root, "d", "deep", "a"), b"1")
    storage.delete(storage.join(root, "nothing"))
    storage.delete(storage.join(root, "d"))
    assert not storage.exists(storage.join(root, "d", "deep", "a"))
    directories.delete_temporaries(storage.join(root, "nothing"))


def test_glob_sorts_and_leaves_hidden_files_out(root: str):
    names = ["b.txt", "a.txt", "a/z.txt", ".hidden.txt", "_SUCCESS.txt", "_log/1.txt", "a/.tmp-x/2.txt", "c.json"]
    for name in names:
        storage.put_bytes(storage.join(root, "d", name), b"1")
    below = storage.join(root, "d")
    assert tails(storage.glob(below), below) == ["a.txt", "a/z.txt", "b.txt", "c.json"]
    assert tails(storage.glob(storage.join(below, "*.txt")), below) == ["a.txt", "b.txt"]
    assert tails(storage.glob(storage.join(below, "**", "*.txt")), below) == ["a.txt", "a/z.txt", "b.txt"]
    assert tails(storage.glob(storage.join(below, "[ab].tx?")), below) == ["a.txt", "b.txt"]
    assert storage.glob(storage.join(below, "*.csv")) == storage.glob(storage.join(root, "nothing")) == []
    assert tails(storage.glob(storage.join(below, "_SUCCESS.txt")), below) == ["_SUCCESS.txt"], "named in full"
    assert tails(storage.glob(storage.join(below, "_log")), below) == ["_log/1.txt"], "what is hidden is below what is named"
    assert storage.list_names(below) == ["_SUCCESS.txt", "a.txt", "b.txt", "c.json"]
    assert storage.list_names(storage.join(root, "nothing")) == []


def test_what_glob_tells_can_be_opened_and_info_tells_the_same(root: str):
    path = storage.join(root, "d", "a.txt")
    storage.put_bytes(path, b"123")
    for pattern in (storage.join(root, "d"), storage.join(root, "d", "*.txt"), path):
        (found,) = storage.glob(pattern)
        assert storage.read_bytes(found.path) == b"123"
        assert (found.size, found.etag) == (3, storage.info(path).etag)
        assert storage.info(found.path) == found
        storage.check_unchanged(found.path, found.etag)


def test_a_changed_file_is_noticed(root: str):
    path = storage.join(root, "a.txt")
    storage.put_bytes(path, b"123")
    etag = storage.info(path).etag
    storage.put_bytes(path, b"1234")
    with pytest.raises(CorpusError, match=r"a\.txt' has changed since the corpus was indexed"):
        storage.check_unchanged(path, etag)
    storage.delete(path)
    with pytest.raises(CorpusError, match="was there when the corpus was indexed and is gone"):
        storage.check_unchanged(path, etag)


def test_a_file_of_another_time_is_another_file(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"123")
    etags = set()
    for time in (0, 1_000_000_000, 1_000_000_001):
        os.utime(path, (time, time))
        etags.add(storage.info(str(path)).etag)
    os.utime(path, (0, 0))
    assert storage.info(str(path)).etag in etags, "a time of zero is a time"
    assert len(etags) == 3


def test_listings_are_not_believed_after_a_change(monkeypatch: pytest.MonkeyPatch):
    """A store that remembers its listings (as s3fs does) is asked again."""
    fs, _ = storage.filesystem("memory://x")
    asked: list[object] = []
    monkeypatch.setattr(type(fs), "invalidate_cache", lambda self, path=None: asked.append(path))
    storage.put_bytes("memory://cache-test/a", b"1")
    storage.info("memory://cache-test/a")
    storage.glob("memory://cache-test")
    assert asked == ["/cache-test/a", None]


@pytest.mark.parametrize(
    ("uri", "package", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs"), ("abfs://b/x", "adlfs", "azure")]
)
def test_a_missing_extra_is_named(uri: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ResourceError, match=rf"not installed; pip install 'finescope\[{extra}\]'"):
        storage.exists(uri)


def test_an_unknown_protocol_is_named():
    with pytest.raises(ResourceError, match="cannot open 'nothing://b': Protocol not known: nothing"):
        storage.exists("nothing://b")


def test_free_bytes_of_a_path_that_is_not_there_yet(tmp_path: Path):
    assert (storage.free_bytes(str(tmp_path / "not" / "yet")) or 0) > 0
    assert storage.free_bytes("memory://x") is None
    assert not (tmp_path / "not").exists()


def test_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert storage.absolute("file:///data/x") == "/data/x"
    assert storage.absolute("memory://x") == "memory://x"


def test_storage_imports_no_torch():
    code = "import sys, finescope.storage; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'polars')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("root", ["", "memory://put-jsonl"])
def test_json_lines_are_whole_and_readable(tmp_path: Path, root: str):
    uri = storage.join(root or str(tmp_path), "below", "metrics.jsonl")
    rows = [{"step": 1, "loss": 2.5, "norm": None}, {"step": 2, "loss": float("nan"), "norm": float("inf")}]
    storage.put_jsonl(uri, rows)
    lines = storage.read_bytes(uri).decode().splitlines()
    assert lines == ['{"step": 1, "loss": 2.5, "norm": null}', '{"step": 2, "loss": null, "norm": null}']
    assert storage.list_names(storage.join(root or str(tmp_path), "below")) == ["metrics.jsonl"]
    storage.put_jsonl(uri, [])
    assert storage.read_bytes(uri) == b""
