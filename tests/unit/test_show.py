import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from fake_run import CURATED, SCORED, build_run
from typer.testing import CliRunner

from finescope import manifest, show
from finescope.analysis.frames import manifests_of
from finescope.cli import app
from finescope.config import STEPS
from finescope.manifest import StepState


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("show") / "run")
    build_run(output)
    return output


def _call(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def _json(*arguments: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(_call(*arguments, "--json")[0], parse_constant=refuse)


def test_status_tells_all_steps(run: str) -> None:
    told = _json("status", run)
    assert list(told["steps"]) == list(STEPS)
    assert told["steps"]["embed"] | {"state": "done", "path": "embed", "rows": SCORED, "rejects": 3} == told["steps"]["embed"]
    assert told["steps"]["report"]["state"] == "not begun"
    lines = _call("status", run)[0].splitlines()
    assert sum(" done " in line for line in lines) == len(STEPS) - 1
    assert any(line.startswith("report") and "not begun" in line for line in lines)


def _mark(output: str, **changes: Any) -> dict[str, Any]:
    state = StepState(
        state="running", path="prune", identity="x", started=manifest.now(), host=socket.gethostname(), pid=2**22 + 1
    )
    manifest.mark(output, "prune", state.model_copy(update=changes))
    return _json("status", output)["steps"]["prune"]


def test_status_tells_running_from_interrupted_from_failed(tmp_path: Path) -> None:
    output = str(tmp_path)
    build_run(output, until="curate")
    assert _mark(output)["state"] == "interrupted"
    assert _mark(output, pid=os.getpid())["state"] == "running"
    elsewhere = _mark(output, host="another")
    assert (elsewhere["state"], "another" in elsewhere["where"]) == ("running", True)
    failed = _mark(output, state="failed", error="StepFailed: no")
    assert (failed["state"], failed["error"]) == ("failed", "StepFailed: no")
    assert _mark(output, state="done")["state"] == "missing"


def test_inspect_shows_all_that_the_issue_asks_for(run: str) -> None:
    told = _json("inspect", run)
    titles = {
        "dictionaries",
        "latents by frequency",
        "most frequent latents",
        "least frequent live latents",
        "score quantiles",
        "around the cut",
        "top latents",
        "sources",
        "seeds",
        "pruned groups",
        "latents of heads",
        "rewrites",
        "metrics",
        "rejects",
    }
    assert set(told["summaries"]) == titles
    assert told["summaries"]["sources"][0]["share"] == 0.9
    assert {(row["table"], row["step"]): row["rows"] for row in told["tables"]}["curated", "curate"] == CURATED
    out = _call("inspect", run)[0]
    assert all(title in out for title in titles)


@pytest.mark.parametrize(
    "name",
    [
        *("documents", "latents", "embeddings", "scores", "curated", "rejects", "rewrites", "teacher_logprobs"),
        *("importance", "head_latents", "metrics"),
    ],
)
def test_inspect_shows_every_table(run: str, name: str) -> None:
    told = _json("inspect", run, name)
    assert told["rows"] >= len(told["head"]) > 0
    assert list(told["columns"]) == list(told["head"][0])
    assert name in _call("inspect", run, name)[0]


def test_inspect_names_the_tables_that_exist(run: str) -> None:
    assert "its tables: documents, rejects" in _call("inspect", run, "nothing", code=2)[1]


def test_text_of_the_corpus_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show._table("title [bold]", ("column",), [("\x1b[31mred\x1b[0m [green]x[/green]\u202e\r\n",)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[31mred [0m [green]x[/green]" in out
    assert "title [bold]" in out


def test_report_is_written_again_where_it_belongs(run: str) -> None:
    path = _call("report", run)[0].strip()
    assert path == f"{run}/report/report.html"
    assert Path(path).read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("inspect",),
        ("inspect", "scores"),
        ("report",),
        ("export", "--to", "x"),
        ("export", "--format", "gguf", "--to", "x"),
    ],
)
def test_a_missing_run_is_exit_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command, *rest = arguments
    _, error = _call(command, str(tmp_path), *rest, code=2)
    assert error.startswith(f"finescope: no run at '{tmp_path}': it has no run.json")
    assert list(tmp_path.iterdir()) == []


def test_the_closing_table_ends_with_the_report(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = manifests_of(run)
    show.closing_table({**manifests, "report": manifests["index"].model_copy(update={"uri": f"{run}/report"})})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {run}/report/report.html"
    for text in ("recovered", "11.90 (+23 %)", "sympy", "90.0 %", "20.0 %", "distill", "in all"):
        assert any(text in line for line in lines), text


def test_check_model_shows_what_can_be_pruned(tmp_path: Path) -> None:
    from tiny_models import tiny_model

    tiny_model("llama").save_pretrained(tmp_path)
    told = _json("check-model", str(tmp_path))
    assert (told["family"], told["blocks"]) == ("llama", 4)
    out = _call("check-model", str(tmp_path))[0]
    assert "prunable" in out
    assert "self_attn.q_proj" in out


def test_check_model_of_nothing_is_exit_2(tmp_path: Path) -> None:
    assert "expected a hub id" in _call("check-model", " ", code=2)[1]
    assert "check-model" in _call("check-model", str(tmp_path / "nothing"), code=2)[1]
