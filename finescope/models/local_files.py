"""A model's files where transformers can open them: what is remote is copied for as long as it is needed."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finescope import directories, storage

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5")


@contextlib.contextmanager
def local_files(path: str, *, weights: bool) -> Iterator[str]:
    """A hub id or a local directory as it is; a copy of a remote directory, with its weights or without."""
    if "://" not in path:
        yield path
    elif weights:
        with directories.local_directory(path) as local:
            yield str(local)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name in storage.list_names(path):
                if not name.endswith(_WEIGHT_SUFFIXES):
                    (Path(folder) / name).write_bytes(storage.read_bytes(storage.join(path, name)))
            yield folder


@contextlib.contextmanager
def local_gguf(path: str) -> Iterator[Path]:
    """A GGUF file on a local disk."""
    if storage.is_local(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "model.gguf"
        with storage.open_input(path) as remote, open(local, "wb") as file:
            shutil.copyfileobj(remote, file, 2**24)
        yield local
