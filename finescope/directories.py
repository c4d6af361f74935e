"""Directories that are built on a local disk and then put where they belong, or copied to one to be read."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from finescope.processes import is_alive
from finescope.storage import TEMPORARY_PREFIX, filesystem, is_local, join, put_bytes, sync_directory


def put_tree(local_directory: Path, uri: str) -> None:
    """Put a directory's files at `uri`, replacing what an earlier attempt left there.

    On a local disk the directory is renamed into place and so appears whole. On an object store the files appear one
    by one, so that the record of the step, written after this returns, is what makes them count.
    """
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    if isinstance(fs, LocalFileSystem):
        _sync_tree(local_directory)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(str(local_directory), path)
        sync_directory(Path(path).parent)
        return
    for file in sorted(local_directory.rglob("*")):
        if file.is_file():
            put_bytes(join(uri, file.relative_to(local_directory).as_posix()), file.read_bytes())


@contextlib.contextmanager
def scratch_directory(uri: str) -> Iterator[Path]:
    """A local directory, not made yet, to build something in that `put_tree` then moves to `uri`.

    It is on the same disk where `uri` is local, and a step sweeps what is left there; else see `temporary_directory`.
    """
    if not is_local(uri):
        with temporary_directory(uri) as root:
            yield root / "tree"
        return
    parent = Path(filesystem(uri)[1]).parent
    parent.mkdir(parents=True, exist_ok=True)
    root = tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=parent)
    try:
        yield Path(root) / "tree"
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def local_directory(uri: str) -> Iterator[Path]:
    """A local path with the contents of directory `uri`: itself, or a temporary copy that ends with the context."""
    if is_local(uri):
        yield Path(filesystem(uri)[1])
        return
    fs, path = filesystem(uri)
    with temporary_directory(uri) as root:
        for file in fs.find(path):
            target = root / str(file)[len(path) :].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(file, str(target))
        yield root


@contextlib.contextmanager
def temporary_directory(uri: str) -> Iterator[Path]:
    """An empty directory among this machine's temporary files that ends with the context, for work on what is at `uri`.

    What processes that were killed at the same work have left is removed first. Other runs' is not: its name says what `uri` it
    is for and which process's it is.
    """
    work = f"{TEMPORARY_PREFIX}finescope-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    for left in Path(tempfile.gettempdir()).glob(f"{work}-*"):
        if not is_alive(int(left.name.removeprefix(f"{work}-").split("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    root = tempfile.mkdtemp(prefix=f"{work}-{os.getpid()}-")
    try:
        yield Path(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def delete_temporaries(directory: str, below: bool = True) -> None:
    """Remove what writers that were killed left in a local directory and, if `below`, in the directories in it."""
    if is_local(directory):
        for leftover in Path(filesystem(directory)[1]).glob(f"{'**/' if below else ''}{TEMPORARY_PREFIX}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _sync_tree(root: Path) -> None:
    for file in filter(Path.is_file, root.rglob("*")):
        file.chmod(file.stat().st_mode | 0o044)  # libraries may leave files to their owner alone; workers must read them
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
