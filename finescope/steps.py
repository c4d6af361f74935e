"""A step is data: a name, a version, a section and inputs. Identity and place follow; what is done is not done again."""

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finescope import directories, storage
from finescope.errors import StepFailed, UserError
from finescope.manifest import (
    Claim,
    Manifest,
    StepState,
    Table,
    TableFile,
    label_of,
    mark,
    now,
    read_claim,
    read_manifest,
    read_run,
    versions,
    write_claim,
    write_manifest,
)


@dataclass(frozen=True)
class Outcome:
    """What a step's function returns: its counts, its tables and what else is worth knowing."""

    rows_in: int = 0
    rows_out: int = 0
    rejects: int = 0
    tables: Mapping[str, tuple[TableFile, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepInput:
    """What a step's function is given: where to write, and the manifests of the steps that it builds on."""

    uri: str
    identity: str
    inputs: Mapping[str, Manifest]

    def __getitem__(self, step: str) -> Manifest:
        return self.inputs[step]


@dataclass(frozen=True)
class Step:
    """One step of a run. `section` holds everything that changes its result, JSON values only."""

    name: str
    section: Mapping[str, Any]
    inputs: tuple["Step", ...] = ()
    version: int = 1
    domain: str = ""  # of a run of several: which one. The same work under another domain's name has the same identity.

    @property
    def label(self) -> str:
        """What it is called in the run: the name, or NAME-DOMAIN."""
        return label_of(self.name, self.domain)

    @property
    def identity(self) -> str:
        """A hash of name, version, section and the inputs' identities (16 hex digits)."""
        parts = [self.name, self.version, self.section, {step.name: step.identity for step in self.inputs}]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def locate(step: Step, output: str) -> tuple[str, bool]:
    """The name of a step's directory in `output`, and whether this identity has claimed it already.

    The plain name goes to the first identity that asks; a changed recipe gets a name with its identity beside it, so
    that nothing that was dear to compute is overwritten. What the run did under another label, such as `prune` before it
    had a second domain and `prune-math` since, is taken from there.
    """
    free: str | None = None
    for name in (step.label, f"{step.label}-{step.identity[:8]}"):
        claim = read_claim(storage.join(output, name))
        if claim is not None and claim.identity == step.identity:
            return name, True
        if claim is None:
            free = name
            break
    assert free is not None, f"two identities begin with {step.identity[:8]}"
    for state in read_run(output).steps.values():
        claim = read_claim(storage.join(output, state.path)) if state.identity == step.identity else None
        if claim is not None and claim.identity == step.identity:
            return state.path, True
    return free, False


def finished(step: Step, output: str) -> Manifest | None:
    """The manifest of a step that is done with this very identity, or None."""
    name, claimed = locate(step, output)
    found = read_manifest(storage.join(output, name)) if claimed else None
    return found if found and found.identity == step.identity else None


def run(step: Step, output: str, function: Callable[[StepInput], Outcome]) -> Manifest:
    """Run one step whose inputs are done, or return what is there.

    Raises:
        StepFailed: the step's rows in are not its rows out and its rejects.
        UserError: another living process is at work on this step of this run.
    """
    done = finished(step, output)
    if done is not None:
        point_at(step, output, done)
        return done
    name, claimed = locate(step, output)
    uri = storage.join(output, name)
    _refuse_second_driver(step, output, name)
    if not claimed:
        write_claim(uri, Claim(step=step.name, identity=step.identity, version=step.version))
    directories.delete_temporaries(output, below=False)
    directories.delete_temporaries(uri)
    started, clock = now(), time.monotonic()
    state = StepState(
        state="running", path=name, identity=step.identity, started=started, host=socket.gethostname(), pid=os.getpid()
    )
    mark(output, step.label, state)
    inputs = {item.name: _required(item, output) for item in step.inputs}
    try:
        outcome = function(StepInput(uri, step.identity, inputs))
        _check_counts(step, outcome)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        # On a full disk not even this can be written; what failed first is what a person must know.
        with contextlib.suppress(OSError):
            mark(output, step.label, state.model_copy(update={"state": "failed", "finished": now(), "error": reason}))
        raise
    # Workers that were lost meanwhile, and done again, left theirs.
    directories.delete_temporaries(uri)
    manifest = Manifest(
        step=step.name,
        domain=step.domain,
        version=step.version,
        identity=step.identity,
        uri=uri,
        section=dict(step.section),
        inputs={item.name: item.identity for item in step.inputs},
        rows_in=outcome.rows_in,
        rows_out=outcome.rows_out,
        rejects=outcome.rejects,
        tables={table: Table(files=files) for table, files in outcome.tables.items()},
        facts=dict(outcome.facts),
        versions=versions(),
        machine=socket.gethostname(),
        started=started,
        finished=now(),
        seconds=round(time.monotonic() - clock, 3),
    )
    write_manifest(manifest)
    mark(output, step.label, state.model_copy(update={"state": "done", "finished": manifest.finished}))
    return manifest


def _required(step: Step, output: str) -> Manifest:
    manifest = finished(step, output)
    assert manifest is not None, f"input '{step.label}' is not done"
    return manifest


def point_at(step: Step, output: str, done: Manifest) -> None:
    """Let `run.json` name the directory of this identity where it names another or lost the last write."""
    known = read_run(output).steps.get(step.label)
    name = locate(step, output)[0]
    if known is None or known.state != "done" or known.path != name:
        state = StepState(state="done", path=name, identity=step.identity, started=done.started, finished=done.finished)
        mark(output, step.label, state)


def _refuse_second_driver(step: Step, output: str, name: str) -> None:
    """`name` is the step's directory, which may be at work under another label."""
    for label, known in read_run(output).steps.items():
        if (label == step.label or known.path == name) and known.alive and known.pid != os.getpid():
            raise UserError(f"process {known.pid} is at work on step '{label}' of '{output}'; let it end, or end it")


def _check_counts(step: Step, outcome: Outcome) -> None:
    if outcome.rows_in != outcome.rows_out + outcome.rejects:
        raise StepFailed(
            f"step '{step.label}' lost count: {outcome.rows_in} rows in, {outcome.rows_out} out, {outcome.rejects} rejected"
        )
