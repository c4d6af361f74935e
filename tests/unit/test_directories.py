"""Directories that are built beside their place, and what a process that was killed leaves of them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from finescope import directories, storage
from finescope.storage import TEMPORARY_PREFIX


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_put_tree_replaces_what_was_there(root: str):
    target = storage.join(root, "step", "model")
    for contents in ({"a.bin": b"1", "deep/b.bin": b"2"}, {"deep/c.bin": b"3"}):
        with directories.scratch_directory(target) as scratch:
            for name, data in contents.items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_bytes(data)
            directories.put_tree(scratch, target)
        found = [file.path.partition("/step/model/")[2] for file in storage.glob(target)]
        assert found == sorted(contents)
        with directories.local_directory(target) as local:
            assert {name: (local / name).read_bytes() for name in files_below(local)} == contents
    assert len(storage.glob(root)) == 1, "no scratch directory is left"


def test_scratch_is_removed_after_an_error(tmp_path: Path):
    def build() -> None:
        with directories.scratch_directory(str(tmp_path / "model")) as scratch:
            scratch.mkdir()
            (scratch / "half").write_bytes(b"1")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        build()
    assert list(tmp_path.iterdir()) == []


def test_what_is_built_for_an_object_store_is_swept_by_who_builds_it_next(temporary: Path) -> None:
    """A process is killed at work on one URI; others are at work on the same and on another."""
    code = (
        "import os, signal, sys; from finescope import directories\n"
        "with directories.scratch_directory(sys.argv[1]) as folder:\n"
        "    folder.mkdir(); (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "TMPDIR": str(temporary)}
    for uri in ("memory://run/curate/staging", "memory://other/curate/staging"):
        subprocess.run([sys.executable, "-c", code, uri], env=environment, check=False)
    left = {path.name for path in temporary.iterdir()}
    assert len(left) == 2
    assert all(name.startswith(TEMPORARY_PREFIX) for name in left)
    with directories.scratch_directory("memory://run/curate/staging") as one:
        one.mkdir()
        with directories.scratch_directory("memory://run/curate/staging") as other:
            assert one.is_dir(), "of a process that lives"
            assert other != one
            now = {path.name for path in temporary.iterdir()}
            assert len(now & left) == 1, "another run's is not touched"
            assert len(now) == 3
    assert {path.name for path in temporary.iterdir()} == now & left
