from pathlib import Path
from typing import Any

import pytest
from fake_run import build_run
from tiny_dictionary import assert_same, tiny_dictionary
from typer.testing import CliRunner

from finescope import storage
from finescope.analysis.frames import manifests_of
from finescope.cli import app
from finescope.errors import UserError
from finescope.export import export_run
from finescope.models.hooks import HookPoint
from finescope.sae.dictionary import load_dictionary, save_dictionary
from finescope.sae.record import Dictionary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("export") / "run")
    build_run(output)
    return output


def _call(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def _with_dictionary(output: str, dictionary: Dictionary, family: str = "llama") -> str:
    """A run up to `sae` that has this dictionary, trained on a model of this family."""
    build_run(output, until="sae")
    manifests = manifests_of(output)
    save_dictionary(storage.join(manifests["sae"].uri, "dictionary"), dictionary)
    manifest = storage.join(manifests["model"].uri, "manifest.json")
    record: dict[str, Any] = storage.read_json(manifest)
    record["facts"]["reference"]["model_type"] = family
    storage.put_json(manifest, record)
    return output


def test_export_copies_the_student_as_it_is(run: str, tmp_path: Path) -> None:
    to = tmp_path / "deep" / "student"
    assert _call("export", run, "--to", str(to))[0].strip() == str(to)
    assert sorted(file.name for file in to.iterdir()) == ["config.json", "model.safetensors"]
    assert (to / "model.safetensors").read_bytes() == b"recovered"
    assert [file.name for file in to.parent.iterdir()] == ["student"]
    _, error = _call("export", run, "--to", str(to), code=2)
    assert "expected a directory that is empty or not there yet" in error
    (tmp_path / "empty").mkdir()
    _call("export", run, "--to", str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "config.json").exists()


def test_export_takes_the_pruned_model_where_nothing_was_trained(tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    build_run(output, until="prune")
    export_run(output, "hf", str(tmp_path / "student"))
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == b"pruned"
    build_run(str(tmp_path / "short"), until="curate")
    with pytest.raises(UserError, match="no student yet"):
        export_run(str(tmp_path / "short"), "hf", str(tmp_path / "none"))


def test_export_of_a_run_in_memory() -> None:
    build_run("memory://show-run")
    assert export_run("memory://show-run", "hf", "memory://show-export") == "memory://show-export"
    assert storage.read_json("memory://show-export/config.json")["kind"] == "recovered"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("onnx", "no such format; formats: hf, sae-lens, sparsify, gguf"), ("gguf", "convert_hf_to_gguf.py")],
)
def test_formats_that_are_not_there(run: str, tmp_path: Path, name: str, expected: str) -> None:
    _, error = _call("export", run, "--format", name, "--to", str(tmp_path / "x"), code=2)
    assert expected in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("format", "files"),
    [
        ("sae-lens", ["cfg.json", "sae_weights.safetensors"]),
        ("sparsify", ["config.json", "layers.9/cfg.json", "layers.9/finescope.json", "layers.9/sae.safetensors"]),
    ],
)
def test_export_of_the_dictionary(tmp_path: Path, format: str, files: list[str]) -> None:
    dictionary, to = tiny_dictionary(), tmp_path / "there"
    run = _with_dictionary(str(tmp_path / "run"), dictionary)
    where = _call("export", run, "--format", format, "--to", str(to))[0].strip()
    assert where == str(to / "layers.9" if format == "sparsify" else to)
    assert sorted(file.relative_to(to).as_posix() for file in to.rglob("*") if file.is_file()) == files
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", "there"]
    assert_same(load_dictionary(where), dictionary)
    assert "expected a directory that is empty" in _call("export", run, "--format", format, "--to", str(to), code=2)[1]


def test_export_of_a_dictionary_in_memory() -> None:
    run = _with_dictionary("memory://export-dictionary", tiny_dictionary("jumprelu"))
    assert export_run(run, "sae-lens", "memory://export-saelens") == "memory://export-saelens"
    assert_same(load_dictionary("memory://export-saelens"), tiny_dictionary("jumprelu"))


@pytest.mark.parametrize(
    ("dictionary", "family", "format", "expected"),
    [
        (
            tiny_dictionary("relu_l1"),
            "llama",
            "sparsify",
            "this one is relu_l1; SAELens's layout holds it",
        ),
        (tiny_dictionary(hook=HookPoint(10, "mlp_hidden")), "llama", "sparsify", "goes as sae-lens only"),
        (tiny_dictionary(hook=HookPoint(10, "mlp")), "gemma2", "sae-lens", "reads site mlp of family 'gemma2' after the norm"),
    ],
)
def test_what_the_other_tool_cannot_hold(tmp_path: Path, dictionary: Dictionary, family: str, format: str, expected: str) -> None:
    run = _with_dictionary(str(tmp_path / "run"), dictionary, family)
    out, error = _call("export", run, "--format", format, "--to", str(tmp_path / "there"), code=2)
    assert expected in error
    assert "check-model" not in error
    assert out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_run_without_a_dictionary(tmp_path: Path) -> None:
    build_run(str(tmp_path / "run"), until="model")
    _, error = _call("export", str(tmp_path / "run"), "--format", "sae-lens", "--to", str(tmp_path / "x"), code=2)
    assert "has no dictionary yet: 'sae' is not done" in error
