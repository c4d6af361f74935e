"""The command line as a person meets it: help, exit codes, one line that says what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from finescope import pipeline, storage
from finescope.cli import app
from finescope.errors import ResourceError, StepFailed
from finescope.manifest import read_run
from finescope.scaffold import write_example
from finescope.steps import Outcome, StepInput

COMMANDS = ("demo", "init", "plan", "run", "status", "inspect", "report", "check-model", "export", "submit")
HEAVY = ("torch", "ray", "transformers", "deepspeed", "polars", "pyarrow", "pydantic")


def call(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stdout, result.stderr


def refused(*arguments: str) -> str:
    """The one line of an exit with code 2."""
    out, error = call(*arguments, code=2)
    assert out == ""
    (line,) = error.splitlines()
    assert line.startswith("finescope: ")
    return line.removeprefix("finescope: ")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The example recipe with an output of its own and the local runner."""
    path, _ = write_example(tmp_path / "example")
    values = yaml.safe_load(path.read_text())
    values["output"], values["compute"]["runner"] = str(tmp_path / "run"), "local"
    values["corpus"]["path"], values["seeds"]["path"] = str(tmp_path / "none/*.parquet"), str(tmp_path / "example/seeds.jsonl")
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_help_imports_nothing_heavy_and_lists_the_commands():
    code = (
        "import sys\nsys.argv = ['finescope', '--help']\nfrom finescope.cli import main\ntry:\n    main()\nfinally:\n"
        f"    print('IMPORTED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, imported = found.stdout.splitlines()
    assert imported == "IMPORTED []"
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in COMMANDS]
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str):
    out, _ = call(command, "--help")
    assert f" {command} [OPTIONS]" in out
    assert "--verbose" in out
    assert len([line for line in out.splitlines() if line.strip()]) > 4


def test_no_command_is_the_help():
    result = CliRunner().invoke(app, [])
    assert all(command in result.output for command in COMMANDS)


def test_a_command_that_is_none_is_exit_2():
    _, error = call("prune", code=2)
    assert "No such command 'prune'" in error


def test_init_twice_is_exit_2(tmp_path: Path):
    out, _ = call("init", str(tmp_path / "new"))
    assert out.splitlines() == [str(tmp_path / "new" / "recipe.yaml"), str(tmp_path / "new" / "seeds.jsonl")]
    assert "is there already" in refused("init", str(tmp_path / "new"))


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_recipe_that_is_wrong_is_exit_2(recipe: str, tmp_path: Path, command: str):
    assert refused(command, str(tmp_path / "none.yaml")).startswith(f"no recipe at '{tmp_path}/none.yaml'")
    assert refused(command, recipe, "--set", "prune.ration=0.1").endswith("prune.ration: unknown key; did you mean 'ratio'?")
    assert "prune.ratio: " in refused(command, recipe, "--set", "prune.ratio=2")
    assert "expected section.field=value" in refused(command, recipe, "--set", "prune.ratio")
    Path(recipe).write_text("output: [\n")
    assert "recipe.yaml: line 2, column 1 cannot be read" in refused(command, recipe)
    assert not (tmp_path / "run").exists()


def test_submit_of_a_wrong_recipe_is_exit_2(recipe: str):
    assert "unknown key" in refused("submit", recipe, "--address", "http://x:1", "--set", "sae.kk=1")
    assert "is not below the current directory" in refused("submit", recipe, "--address", "http://x:1")


def test_an_unknown_step_is_exit_2(recipe: str):
    line = refused("run", recipe, "--until", "prone")
    assert line.startswith("--until prone: no such step; steps: index, model, sae, ")


def test_no_file_of_the_corpus_is_exit_2(recipe: str, tmp_path: Path):
    assert refused("run", recipe, "--until", "index") == f"corpus.path: no file matches '{tmp_path}/none/*.parquet'"
    assert not (tmp_path / "run").exists()


def test_what_is_not_a_run_is_exit_2(tmp_path: Path):
    run = str(tmp_path)
    for arguments in (("status", run), ("inspect", run), ("report", run), ("export", run, "--to", f"{run}/x")):
        assert refused(*arguments) == f"no run at '{run}': it has no run.json"
    assert "no such format; formats: hf, " in refused("export", run, "--to", f"{run}/x", "--format", "onnx")
    (tmp_path / "run.json").write_text('{"steps": ')
    assert f"'{run}/run.json' is damaged" in refused("status", run)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_missing_extra_is_exit_2(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    assert "pip install 'finescope[azure]'" in refused("status", "abfs://container/run")


def test_verbose_shows_the_traceback(tmp_path: Path):
    _, error = call("status", str(tmp_path), "--verbose", code=2)
    lines = error.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("finescope: no run at")


def put_stages(monkeypatch: pytest.MonkeyPatch, index: Exception | None) -> None:
    """A stage `index` that does nothing or fails, and a machine that is large enough."""

    def stage(step: StepInput) -> Outcome:
        if index is not None:
            raise index
        return Outcome(2, 1, 1)

    monkeypatch.setattr(pipeline, "functions_of", lambda recipe, context: {"index": stage})
    monkeypatch.setattr("finescope.demo.check_resources", lambda recipe: None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StepFailed("3 of 4 rows rejected"), "3 of 4 rows rejected"),
        (ZeroDivisionError("by zero\nmore"), "ZeroDivisionError: by zero"),
    ],
)
def test_a_failed_step_is_exit_1_with_reason_and_log(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
):
    put_stages(monkeypatch, error)
    out, shown = call("run", recipe, code=1)
    assert out == ""
    *_, message, where = shown.splitlines()
    assert message == f"finescope: step 'index' failed: {reason}"
    log = Path(where.removeprefix("finescope: log: "))
    assert log.parent == tmp_path / "run" / "logs"
    assert "Traceback (most recent call last):" in log.read_text()
    assert str(error) in log.read_text()
    assert "Traceback" not in shown
    state = read_run(str(tmp_path / "run")).steps["index"]
    assert (state.state, state.error) == ("failed", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    out, _ = call("status", str(tmp_path / "run"))
    assert "failed" in out


def test_a_user_error_in_a_step_is_exit_2(recipe: str, monkeypatch: pytest.MonkeyPatch):
    put_stages(monkeypatch, ResourceError("no room"))
    assert refused("run", recipe) == "no room"


def test_run_until_and_again(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put_stages(monkeypatch, None)
    out, shown = call("run", recipe, "--until", "index")
    assert out == ""
    assert [line.split(":")[0] for line in shown.splitlines()] == ["index"]
    before = storage.read_bytes(str(tmp_path / "run" / "run.json"))
    monkeypatch.setattr(pipeline, "functions_of", lambda recipe, context: pytest.fail("nothing is to do"))
    _, shown = call("run", recipe, "--until", "index", "--log-json")
    assert yaml.safe_load(shown)["message"] == f"nothing to do: all 1 steps of '{tmp_path}/run' are done"
    assert storage.read_bytes(str(tmp_path / "run" / "run.json")) == before


def test_an_interrupt_is_130(recipe: str, monkeypatch: pytest.MonkeyPatch):
    put_stages(monkeypatch, KeyboardInterrupt())  # pyright: ignore[reportArgumentType]
    _, shown = call("run", recipe, code=130)
    assert shown.splitlines()[-1] == "interrupted; the same command goes on where it stopped"


def test_no_room_on_disk_is_exit_1_and_not_a_traceback(recipe: str, monkeypatch: pytest.MonkeyPatch):
    put_stages(monkeypatch, None)

    def full(uri: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "put_bytes", full)
    _, shown = call("run", recipe, code=1)
    assert shown.splitlines()[-1] == "finescope: step 'index' failed: OSError: [Errno 28] No space left on device"
    assert "Traceback" not in shown
