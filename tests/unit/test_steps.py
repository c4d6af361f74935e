import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finescope import steps, storage
from finescope.errors import StepFailed, UserError
from finescope.manifest import (
    Manifest,
    StepState,
    TableFile,
    manifest_of,
    mark,
    now,
    read_manifest,
    read_run,
    require_run,
    write_manifest,
)
from finescope.steps import Outcome, Step, StepInput

FIRST = Step("first", {"seed": 0, "size": 3})
SECOND = Step("second", {"k": 1}, (FIRST,))


class Function:
    """A step's function that counts its calls and writes a file."""

    def __init__(self, outcome: Outcome | BaseException | None = None, then: Callable[[StepInput], None] | None = None):
        self.calls: list[StepInput] = []
        self._outcome, self._then = outcome or Outcome(3, 2, 1, facts={"answer": 42}), then

    def __call__(self, step: StepInput) -> Outcome:
        self.calls.append(step)
        storage.put_bytes(storage.join(step.uri, "out.txt"), step.identity.encode())
        if self._then:
            self._then(step)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


def contents(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_identity_is_that_of_name_version_section_and_inputs():
    changed = [
        Step("other", FIRST.section),
        Step("first", FIRST.section, version=2),
        Step("first", {"seed": 1, "size": 3}),
        Step("first", {"seed": 0}),
        Step("first", FIRST.section, (SECOND,)),
    ]
    assert len({FIRST.identity, *(step.identity for step in changed)}) == 6
    assert Step("first", {"size": 3, "seed": 0}).identity == FIRST.identity, "the order of keys says nothing"
    assert Step("second", {"k": 1}, (Step("first", {"seed": 0, "size": 3}),)).identity == SECOND.identity
    assert Step("second", {"k": 1}, (changed[2],)).identity != SECOND.identity
    assert len(FIRST.identity) == 16


def test_identity_is_the_same_in_every_process():
    code = f"from finescope.steps import Step; print(Step('second', {{'k': 1}}, ({FIRST!r},)).identity)"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == SECOND.identity


@pytest.fixture(params=["local", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.as_posix().strip('/')}"


def test_a_run_and_the_same_again(output: str):
    function = Function(Outcome(3, 2, 1, {"t": (TableFile(path="t/part-0.parquet", rows=2, bytes=9),)}, {"answer": 42}))
    done = steps.run(FIRST, output, function)
    assert (done.rows_in, done.rows_out, done.rejects, done.facts) == (3, 2, 1, {"answer": 42})
    assert (done.identity, done.section, done.inputs) == (FIRST.identity, FIRST.section, {})
    assert done.files("t") == [storage.join(output, "first", "t", "part-0.parquet")]
    assert done.tables["t"].rows == 2
    assert steps.run(FIRST, output, function) == done == steps.finished(FIRST, output) == manifest_of(output, "first")
    assert len(function.calls) == 1
    state = read_run(output).steps["first"]
    assert (state.state, state.path, state.identity, state.error) == ("done", "first", FIRST.identity, None)
    assert state.finished == done.finished >= done.started == state.started
    assert {"python", "finescope", "torch"} <= set(done.versions) | {"finescope"}


def test_a_step_is_given_the_manifests_of_its_inputs(tmp_path: Path):
    first = steps.run(FIRST, str(tmp_path), Function())
    second = Function()
    steps.run(SECOND, str(tmp_path), second)
    (given,) = second.calls
    assert (given.uri, given.identity, dict(given.inputs)) == (str(tmp_path / "second"), SECOND.identity, {"first": first})
    assert given["first"].facts == {"answer": 42}
    assert manifest_of(str(tmp_path), "second").inputs == {"first": FIRST.identity}


def test_the_manifest_is_the_last_file_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[str] = []
    put = storage.put_bytes

    def recorded(uri: str, data: bytes) -> None:
        written.append(Path(uri).relative_to(tmp_path).as_posix())
        put(uri, data)

    monkeypatch.setattr(storage, "put_bytes", recorded)
    steps.run(FIRST, str(tmp_path), Function())
    assert written == ["first/step.json", "run.json", "first/out.txt", "first/manifest.json", "run.json"]


def test_a_changed_recipe_gets_a_directory_of_its_own(tmp_path: Path):
    output, changed = str(tmp_path), Step("first", {"seed": 1})
    steps.run(FIRST, output, Function())
    before = contents(tmp_path / "first")
    second = steps.run(changed, output, Function())
    assert second.uri == f"{output}/first-{changed.identity[:8]}"
    assert contents(tmp_path / "first") == before
    assert read_run(output).steps["first"].path == f"first-{changed.identity[:8]}"
    assert manifest_of(output, "first") == second
    function = Function()
    assert steps.run(FIRST, output, function).uri == f"{output}/first"
    assert not function.calls
    assert read_run(output).steps["first"].path == "first", "run.json points at what the last command is about"
    assert steps.finished(changed, output) == second


def test_inputs_of_a_changed_recipe_are_its_own(tmp_path: Path):
    output, changed = str(tmp_path), Step("first", {"seed": 1})
    steps.run(FIRST, output, Function())
    steps.run(changed, output, Function())
    function = Function()
    steps.run(Step("second", {"k": 1}, (changed,)), output, function)
    assert function.calls[0]["first"].identity == changed.identity


@pytest.mark.parametrize("counts", [(3, 2, 0), (3, 3, 1), (0, 1, 0)])
def test_rows_that_do_not_add_up_fail_the_step(tmp_path: Path, counts: tuple[int, int, int]):
    with pytest.raises(StepFailed, match=rf"step 'first' lost count: {counts[0]} rows in, {counts[1]} out, {counts[2]} rej"):
        steps.run(FIRST, str(tmp_path), Function(Outcome(*counts)))
    assert read_run(str(tmp_path)).steps["first"].state == "failed"
    assert read_manifest(str(tmp_path / "first")) is None


@pytest.mark.parametrize("error", [ValueError("one\ntwo"), KeyboardInterrupt(), StepFailed("no")])
def test_a_failed_step_says_why_and_is_run_again(tmp_path: Path, error: BaseException):
    output = str(tmp_path)
    with pytest.raises(type(error)):
        steps.run(FIRST, output, Function(error))
    state = read_run(output).steps["first"]
    assert (state.state, state.path) == ("failed", "first")
    assert (state.error or "").startswith(type(error).__name__)
    assert "two" not in (state.error or "")
    assert steps.finished(FIRST, output) is None
    with pytest.raises(UserError, match="has not done step 'first'"):
        manifest_of(output, "first")
    assert steps.run(FIRST, output, Function()).uri == f"{output}/first"
    assert read_run(output).steps["first"].error is None


def killed(output: str, **changes: Any) -> None:
    """What a driver that was killed in the middle leaves behind."""
    with pytest.raises(KeyboardInterrupt):
        steps.run(FIRST, output, Function(KeyboardInterrupt()))
    for directory in (output, f"{output}/first"):
        storage.put_bytes(f"{directory}/{storage.TEMPORARY_PREFIX}half", b"half")
    state = StepState(state="running", path="first", identity=FIRST.identity, started=now(), host=socket.gethostname())
    mark(output, "first", state.model_copy(update=changes))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield sleeping
    sleeping.kill()
    sleeping.wait()


def test_a_killed_attempt_goes_on_in_its_directory(tmp_path: Path, process: subprocess.Popen[bytes]):
    process.kill()
    process.wait()
    killed(str(tmp_path), pid=process.pid)
    assert not read_run(str(tmp_path)).steps["first"].alive
    seen: list[bool] = []
    done = steps.run(FIRST, str(tmp_path), Function(then=lambda step: seen.append(bool(list(tmp_path.rglob(".tmp-*"))))))
    assert (done.uri, seen) == (str(tmp_path / "first"), [False])
    assert sorted(contents(tmp_path)) == ["first/manifest.json", "first/out.txt", "first/step.json", "run.json"]


def test_what_lost_workers_leave_is_gone_when_the_step_is_done(tmp_path: Path):
    def leave(step: StepInput) -> None:
        storage.put_bytes(f"{step.uri}/units/{storage.TEMPORARY_PREFIX}half", b"half")

    steps.run(FIRST, str(tmp_path), Function(then=leave))
    assert list(tmp_path.rglob(f"{storage.TEMPORARY_PREFIX}*")) == []


def test_what_failed_first_is_told_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(step: StepInput) -> None:
        def put_bytes(uri: str, data: bytes) -> None:
            raise OSError("still full")

        monkeypatch.setattr(storage, "put_bytes", put_bytes)

    with pytest.raises(StepFailed, match="the first reason"):
        steps.run(FIRST, str(tmp_path), Function(StepFailed("the first reason"), full))


def test_a_driver_that_lives_is_not_disturbed(tmp_path: Path, process: subprocess.Popen[bytes]):
    killed(str(tmp_path), pid=process.pid)
    before, function = contents(tmp_path), Function()
    with pytest.raises(UserError, match=rf"process {process.pid} is at work on step 'first'"):
        steps.run(FIRST, str(tmp_path), function)
    assert not function.calls
    assert contents(tmp_path) == before
    steps.run(Step("other", {}), str(tmp_path), Function())


@pytest.mark.parametrize("changes", [{"host": "another"}, {"pid": os.getpid()}, {"state": "failed", "pid": 1}])
def test_who_is_no_second_driver(tmp_path: Path, changes: dict[str, Any]):
    killed(str(tmp_path), **changes)
    assert steps.run(FIRST, str(tmp_path), Function()).rows_in == 3


def test_killed_between_manifest_and_run_record(tmp_path: Path):
    output = str(tmp_path)
    done = steps.run(FIRST, output, Function())
    mark(output, "first", StepState(state="running", path="first", identity=FIRST.identity, started=done.started, pid=2**22 + 1))
    function = Function()
    assert steps.run(FIRST, output, function) == done
    assert not function.calls
    assert read_run(output).steps["first"].state == "done"


def test_a_manifest_comes_back_as_it_was_and_follows_its_directory(tmp_path: Path):
    done = steps.run(FIRST, str(tmp_path / "a"), Function())
    assert read_manifest(done.uri) == done
    write_manifest(done)
    assert read_manifest(done.uri) == done
    (tmp_path / "a").rename(tmp_path / "b")
    moved = manifest_of(str(tmp_path / "b"), "first")
    assert moved == done.model_copy(update={"uri": str(tmp_path / "b" / "first")})
    assert steps.finished(FIRST, str(tmp_path / "b")) == moved


@pytest.mark.parametrize("damage", [b"", b'{"steps": {"first": {"sta', b"\xff\xfe", b"[]", b'{"steps": {}, "of_the_future": 1}'])
@pytest.mark.parametrize(
    ("name", "cure"), [("run.json", "run.json"), ("first/manifest.json", "first/manifest.json"), ("first/step.json", "first")]
)
def test_a_damaged_record_is_named_and_its_cure_works(tmp_path: Path, damage: bytes, name: str, cure: str):
    output = str(tmp_path)
    steps.run(FIRST, output, Function())
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match=rf"{name}' is damaged or of another version of finescope: remove") as caught:
        steps.run(FIRST, output, Function())
    assert "\n" not in str(caught.value)
    storage.delete(f"{output}/{cure}")
    steps.run(FIRST, output, Function())
    assert manifest_of(output, "first").rows_in == 3


def test_run_record_is_written_anew_from_what_is_done(tmp_path: Path):
    output = str(tmp_path)
    steps.run(FIRST, output, Function())
    (tmp_path / "run.json").unlink()
    function = Function()
    steps.run(FIRST, output, function)
    assert not function.calls
    assert require_run(output).steps["first"].state == "done"


def test_no_run_is_named(tmp_path: Path):
    for read in (require_run, lambda output: manifest_of(output, "first")):
        with pytest.raises(UserError, match=r"no run at '.*': it has no run\.json"):
            read(str(tmp_path))
    assert read_run(str(tmp_path)).steps == {}


def test_another_identity_with_the_same_name_is_never_taken_for_done(tmp_path: Path):
    """Somebody removed step.json alone: the manifest beside it is of another identity."""
    output, changed = str(tmp_path), Step("first", {"seed": 1})
    steps.run(FIRST, output, Function())
    (tmp_path / "first" / "step.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        steps.run(changed, output, Function(KeyboardInterrupt()))
    assert steps.finished(changed, output) is None


def test_manifest_is_json_that_people_can_read(tmp_path: Path):
    steps.run(FIRST, str(tmp_path), Function())
    text = (tmp_path / "first" / "manifest.json").read_text()
    assert text.count("\n") > 15
    assert set(json.loads(text)) == set(Manifest.model_fields)
