"""Trackers: real ones where their packages are installed (extra `track`), and stand-ins for what they cannot be made to do."""

import importlib.util
import logging
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finescope.distillation import tracking
from finescope.distillation.trackers import MLflowTracker, TensorBoardTracker, TrackedRun, Unreachable
from finescope.distillation.tracking import Trackers, check_trackers, live_note, open_trackers
from finescope.errors import ResourceError

SETTINGS = {"learning_rate": 5e-5, "method": "lora", "patience": None}
INSTALLED = [name for name, packages in tracking._PACKAGES.items() if all(map(importlib.util.find_spec, packages))]
MLFLOW, WANDB, TENSORBOARD = (
    pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed: pip install 'finescope[track]'")
    for name in ("mlflow", "wandb", "tensorboard")
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run_at(directory: Path, identity: str = "0123456789abcdef") -> TrackedRun:
    return TrackedRun("finescope", "math/distill", identity, SETTINGS, directory)


def row(step: int, attempt: int = 1) -> dict[str, float]:
    """Loss 10 less the step; `attempt` tells who said so."""
    return {"loss": 10.0 - step, "attempt": float(attempt), "time": 1.7e9 + step}


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_distillation_tracking import row, run_at
from finescope.distillation.tracking import open_trackers
trackers = open_trackers(sys.argv[3:], run_at(Path(sys.argv[1])))
for step in range(1, 6):
    trackers.log(step, row(step))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of six steps in every tracker there is: killed after five, gone on from a checkpoint after three."""
    directory = tmp_path_factory.mktemp("tracked")
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-c", _KILLED, str(directory), str(Path(__file__).parent), *INSTALLED]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with open_trackers(INSTALLED, run_at(directory)) as trackers:
            for step in range(1, 7):
                trackers.log(step, row(step, attempt=2))
        assert trackers.lost == []
    return directory


@MLFLOW
def test_mlflow_has_one_run_and_each_step_once(resumed: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{resumed}/mlflow.db")
    experiment = client.get_experiment_by_name("finescope")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value, point.timestamp) for point in points) == [
        (step, 10.0 - step, int((1.7e9 + step) * 1000)) for step in range(1, 7)
    ]
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}
    assert set(run.data.metrics) == {"loss", "attempt"}
    assert (run.info.run_name, run.info.status) == ("math/distill", "FINISHED")


@MLFLOW
def test_mlflow_tells_runs_apart_and_failed_ones(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with pytest.raises(InterruptedError), open_trackers(["mlflow"], run_at(tmp_path, "a" * 16)):
        raise InterruptedError
    with open_trackers(["mlflow"], run_at(tmp_path, "b" * 16)) as trackers:
        trackers.log(1, row(1))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    states = {run.data.tags["finescope.identity"]: (run.info.status, run.data.metrics.get("loss")) for run in runs}
    assert states == {"a" * 16: ("FAILED", None), "b" * 16: ("FINISHED", 9.0)}


@MLFLOW
def test_an_mlflow_server_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with open_trackers(["mlflow"], run_at(tmp_path)) as trackers:
        trackers.log(1, row(1))
    assert trackers.lost == ["mlflow"]
    assert [record.name for record in caplog.records if "mlflow cannot be reached" in record.message] == [tracking.__name__]


@MLFLOW
@pytest.mark.parametrize(
    ("code", "raised"), [("TEMPORARILY_UNAVAILABLE", Unreachable), ("INVALID_PARAMETER_VALUE", ResourceError)]
)
def test_what_mlflow_says_later(tmp_path: Path, code: str, raised: type[Exception]) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("no\nmore", error_code=ErrorCode.Value(code))

    tracker = MLflowTracker(run_at(tmp_path))
    tracker._client.log_batch = refuse
    tracker.log(1, {"loss": 1.0}, 0.0)
    with pytest.raises(raised, match=r"no$"):
        tracker.close(failed=False)


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The rows of an offline run: a LevelDB log of protocol buffers, in blocks of 32 KiB after a header of 7 bytes."""
    import json

    from wandb.proto import wandb_internal_pb2

    data, at, found, parts = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<xxxxHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(parts)
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found += [items] if items else []
            parts = b""
    return found


@WANDB
def test_wandb_offline_has_the_whole_history_in_the_last_attempt(resumed: Path) -> None:
    (_, last) = sorted(
        (resumed / "wandb").glob("offline-run-*/run-0123456789abcdef.wandb"), key=lambda path: path.stat().st_mtime
    )
    rows = wandb_history(last)
    assert [(row["_step"], row["loss"], row["_timestamp"]) for row in rows] == [
        (step, 10.0 - step, 1.7e9 + step) for step in range(1, 7)
    ]


@WANDB
def test_wandb_is_not_told_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    told: list[int] = []
    asked: dict[str, Any] = {}

    def init(**settings: Any) -> SimpleNamespace:
        asked.update(settings)
        return SimpleNamespace(step=4, log=lambda _, step, commit: told.append(step), finish=lambda exit_code: told.append(-1))

    monkeypatch.setattr(wandb, "init", init)
    with open_trackers(["wandb"], run_at(tmp_path)) as trackers:
        for step in (1, 2, 3, 4, 5, 4, 5, 6):
            trackers.log(step, row(step))
    assert told == [4, 5, 6, -1]
    assert (asked["id"], asked["resume"], asked["config"]) == ("0123456789abcdef", "allow", SETTINGS)


@WANDB
def test_wandb_that_is_not_there_and_wandb_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb.errors import CommError, UsageError

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", lambda **_: fail(CommError("no route")))
    assert open_trackers(["wandb"], run_at(tmp_path)).lost == ["wandb"]
    monkeypatch.setattr(wandb, "init", lambda **_: fail(UsageError("No API key configured")))
    with pytest.raises(ResourceError, match="wandb refuses: No API key configured"):
        open_trackers(["wandb"], run_at(tmp_path))


def scalars(directory: Path, name: str) -> list[tuple[int, float, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value, event.wall_time) for event in events.Scalars(name)]


@TENSORBOARD
def test_tensorboard_shows_each_step_once(resumed: Path) -> None:
    directory = resumed / "tensorboard" / "math" / "distill-01234567"
    assert scalars(directory, "loss") == [(step, 10.0 - step, 1.7e9 + step) for step in range(1, 7)]
    assert {value for _, value, _ in scalars(directory, "attempt")} == {2.0}


@TENSORBOARD
def test_tensorboard_forgets_what_a_training_went_back_over(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(run_at(tmp_path))
    for step, loss in [(1, 3.0), (2, 9.0), (3, 99.0), (2, 2.5), (3, 2.0)]:
        tracker.log(step, {"loss": loss}, 0.0)
    tracker.close(failed=False)
    found = scalars(tmp_path / "tensorboard" / "math" / "distill-01234567", "loss")
    assert [(step, value) for step, value, _ in found] == [(1, 3.0), (2, 2.5), (3, 2.0)]


@TENSORBOARD
def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("not a directory")
    with open_trackers(["tensorboard"], run_at(tmp_path)) as trackers:
        trackers.log(1, row(1))
    assert trackers.lost == ["tensorboard"]


@pytest.mark.parametrize("name", tracking._PACKAGES)
def test_a_missing_package_is_said(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ResourceError, match=rf"{name} needs .*finescope\[track\]"):
        check_trackers((name,))
    check_trackers(())
    with pytest.raises(ResourceError):
        open_trackers((name,), run_at(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class _Until:
    """Listens up to a step, at which it fails."""

    def __init__(self, step: int, error: type[Exception]) -> None:
        self.step, self.error = step, error
        self.told: list[tuple[int, Mapping[str, float], float]] = []

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        if step == self.step:
            raise self.error("gone")
        self.told.append((step, values, seconds))

    def close(self, failed: bool) -> None:
        self.told.append((-1, {}, float(failed)))


def test_one_that_falls_silent_is_warned_of_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    silent, other = _Until(2, Unreachable), _Until(9, Unreachable)
    trackers = Trackers()
    trackers._open = {"wandb": silent, "mlflow": other}
    with caplog.at_level(logging.WARNING), trackers:
        for step in range(1, 5):
            trackers.log(step, row(step))
    assert [step for step, _, _ in silent.told] == [1]
    assert other.told == [*((step, {"loss": 10.0 - step, "attempt": 1.0}, 1.7e9 + step) for step in range(1, 5)), (-1, {}, 0.0)]
    assert [record.message for record in caplog.records] == [
        "wandb cannot be reached, and is told no more of this training: gone"
    ]
    assert trackers.lost == ["wandb"]


def test_nothing_else_is_put_up_with() -> None:
    trackers = Trackers()
    trackers._open = {"wandb": _Until(1, ValueError)}
    with pytest.raises(ValueError, match="gone"):
        trackers.log(1, row(1))


def test_the_note_by_hand() -> None:
    values = {"loss": 2.309, "held_out_loss": 2.4, "learning_rate": 4.1e-5, "tokens_per_second": 1250.4, "memory_bytes": 3.1e9}
    assert live_note(values) == "loss 2.31, held-out 2.40, lr 4.1e-05, 1,250 tokens/s, 3.1 GB"
    assert live_note({**values, "device_bytes": 7e10}, ["wandb"]).endswith("tokens/s, 70.0 GB, wandb not reached")
    assert live_note({"loss": float("nan"), "time": 1.0}) == "loss nan"
