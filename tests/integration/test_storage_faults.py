"""Storage that fails while a run writes: one line, nothing half-written, and the same command goes on afterwards."""

import contextlib
import errno
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import polars as pl
import pytest
import torch
from cli_runs import Ended, finescope, leftovers, write_recipe
from fsspec.implementations.memory import MemoryFileSystem
from tiny_run import recipe_values, write_inputs

from finescope import storage
from finescope.config import STEPS
from finescope.manifest import manifest_of

pytestmark = pytest.mark.timeout(1200)

_UNTIL = "curate"
_STEPS = STEPS[: STEPS.index(_UNTIL) + 1]
_TABLES = (("sae", "latents"), ("embed", "embeddings"), ("score", "scores"), ("curate", "curated"))
_SMALL = {"sae": {"num_tokens": 800, "epochs": 1, "recovery_documents": 2}, "curate": {"documents": 12}}


class Breakable(MemoryFileSystem):
    """An object store in memory, every object of which can be written when it is tried a second time, in another run."""

    protocol = "breakable"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    error: ClassVar[int | None] = None  # of every write, where it is set
    tried: ClassVar[set[str] | None] = None  # objects whose first write failed; None: none fails
    failing: ClassVar[bool] = False  # a disk that was full once in a run stays full

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("breakable://", "memory://", 1))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        cls = type(self)
        if cls.tried is not None and path not in cls.tried:
            cls.tried.add(path)
            cls.failing = True
        code = cls.error or (errno.ENOSPC if cls.failing else None)
        if code:
            raise OSError(code, os.strerror(code), path)
        super().pipe_file(path, value, mode, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_inputs(tmp_path_factory.mktemp("faults"), documents=60, files=2, rows_per_group=15)
    write_recipe(root / "recipe.yaml", recipe_values(root, "faults", **_SMALL))
    return root


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Iterator[dict[str, pl.DataFrame]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        fsspec.register_implementation("breakable", Breakable, clobber=True)
        output = str(root / "runs" / "undisturbed")
        assert _run(root, output).code == 0
        yield _tables(output)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def sound() -> Iterator[None]:
    yield
    Breakable.error, Breakable.tried, Breakable.failing = None, None, False


def _run(root: Path, output: str, until: str = _UNTIL) -> Ended:
    return finescope("run", str(root / "recipe.yaml"), "--set", f"output={output}", "--until", until)


def _tables(output: str) -> dict[str, pl.DataFrame]:
    found = {}
    for step, table in _TABLES:
        files = manifest_of(output, step).files(table)
        found[table] = pl.concat([pl.from_arrow(storage.read_parquet(file)) for file in files])  # pyright: ignore[reportArgumentType]
    return found


def _same(output: str, expected: dict[str, pl.DataFrame]) -> bool:
    found = _tables(output)
    return all(found[name].equals(frame) for name, frame in expected.items())


def _one_line(ended: Ended, reason: str) -> None:
    lines = [line for line in ended.errors if not line.startswith("finescope: log: ")]
    assert (ended.code, len(lines)) == (1, 1), ended.err
    assert reason in lines[0]
    assert "step '" in lines[0]
    assert "Traceback" not in ended.err


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """A limit of the kernel's: a write beyond it fails half-way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_local_disk_that_takes_less_than_a_file(root: Path, undisturbed: dict[str, pl.DataFrame]) -> None:
    output = root / "runs" / "limited"
    failed: set[tuple[str, int]] = set()
    for step in _STEPS:
        for size in (2**6, 2**10, 2**11, 2**12, 2**14, 2**20):
            with _largest_file(size):
                ended = _run(root, str(output), step)
            if ended.code == 0:
                break
            _one_line(ended, "File too large")
            failed.add((step, size))
            assert [path for path in leftovers(output) if path.name.startswith(".tmp-")] == []
            for path in output.rglob("*.parquet"):
                pl.read_parquet(path)
            for path in output.rglob("*.json"):
                json.loads(path.read_text())
        assert ended.code == 0, ended.err
    assert {(step, 2**6) for step in _STEPS} <= failed
    assert {(step, 2**10) for step in ("index", "sae", "embed", "score", "curate")} <= failed
    assert leftovers(output) == []
    assert _same(str(output), undisturbed)


def test_a_store_that_is_full_at_every_object(root: Path, undisturbed: dict[str, pl.DataFrame]) -> None:
    output, starts = "breakable://full/run", 0
    Breakable.tried = set()
    while True:
        Breakable.failing = False
        before = len(Breakable.tried)
        ended = _run(root, output)
        starts += 1
        if ended.code == 0:
            break
        assert len(Breakable.tried) > before
        _one_line(ended, "No space left on device")
    written = {path for path in Breakable.store if path.startswith("/full/")}
    assert starts > 30
    assert written <= Breakable.tried
    assert _same(output, undisturbed)
    manifests = [manifest_of(output, step) for step in _STEPS]
    named = {file for manifest in manifests for table in manifest.tables for file in manifest.files(table)}
    assert {f"breakable:/{path}" for path in written if path.endswith(".parquet")} == named


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("begun", [False, True])
def test_an_output_that_is_read_only(root: Path, undisturbed: dict[str, pl.DataFrame], code: int, begun: bool) -> None:
    output = f"breakable://read-only-{code}-{begun}/run"
    if begun:
        assert _run(root, output, "embed").code == 0
    before = dict(Breakable.store)
    Breakable.error = code
    _one_line(_run(root, output), os.strerror(code))
    assert Breakable.store == before
    Breakable.error = None
    assert _run(root, output).code == 0
    assert _same(output, undisturbed)
