"""The records on storage: a step's manifest, written last, and the run's `run.json`, which says where everything is."""

import datetime
import importlib.metadata
import platform
import socket
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from finescope import storage
from finescope.errors import UserError
from finescope.processes import is_alive

MANIFEST = "manifest.json"
RUN = "run.json"
CLAIM = "step.json"
# The steps that all domains of a run have in common; from the next on each has its own.
SHARED_STEPS = ("index", "model", "sae", "screen", "embed")
_VERSIONS = ("finescope", "torch", "transformers", "ray", "pyarrow", "polars", "datasets", "peft", "deepspeed")


class Record(BaseModel):
    """Base of all records: frozen; an unknown key is an error, as it means another version wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_Record = TypeVar("_Record", bound=Record)


class TableFile(Record):
    """One Parquet file of a table, relative to its step's directory."""

    path: str
    rows: int
    bytes: int


class Table(Record):
    """A table of a step. Readers take the files from here and never list a directory."""

    files: tuple[TableFile, ...] = ()

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


class Manifest(Record):
    """What a step did. It exists if and only if the step is done."""

    step: str
    domain: str = ""  # in a run of several
    version: int
    identity: str
    uri: str  # the step's directory; not part of what is compared, a run may be moved
    section: dict[str, Any]
    inputs: dict[str, str]  # step name -> identity
    rows_in: int
    rows_out: int
    rejects: int
    tables: dict[str, Table]
    facts: dict[str, Any]  # what later steps and people need to know: sizes, counts, measured figures
    versions: dict[str, str]
    machine: str
    started: str
    finished: str
    seconds: float

    def files(self, table: str) -> list[str]:
        """The URIs of a table's files, in order."""
        return [storage.join(self.uri, file.path) for file in self.tables[table].files]


class Claim(Record):
    """Whose a step's directory is; the first write of a step."""

    step: str
    identity: str
    version: int


class StepState(Record):
    """A step as `run.json` tells of it."""

    state: Literal["running", "done", "failed"]
    path: str  # relative to the output
    identity: str
    started: str
    finished: str | None = None
    error: str | None = None
    host: str = ""
    pid: int = 0

    @property
    def alive(self) -> bool:
        """Whether the driver that runs it is a living process of this machine."""
        return self.state == "running" and self.host == socket.gethostname() and is_alive(self.pid)


class RunRecord(Record):
    """All steps of a run by their labels, in the order in which they were begun."""

    finescope: str = ""
    steps: dict[str, StepState] = {}


def label_of(step: str, domain: str) -> str:
    """What a step of a domain is called in a run: a step may have a number after a dash, a domain has no dash in it."""
    return f"{step}-{domain}" if domain else step


def step_and_domain(label: str) -> tuple[str, str]:
    """What `label_of` joined."""
    step, _, domain = label.partition("-")
    number, _, rest = domain.partition("-")
    return (f"{step}-{number}", rest) if number.isdigit() else (step, domain)


def domains_of(labels: Iterable[str]) -> list[str]:
    """The domains that labels of a run name, in order; empty in a run of one domain."""
    return [domain for domain in dict.fromkeys(step_and_domain(label)[1] for label in labels) if domain]


def of_domain(manifests: Mapping[str, Manifest], domain: str) -> dict[str, Manifest]:
    """The manifests that one domain builds on, by step: what all share and its own.

    Other steps without a domain are of a run of one domain at the same output, and not this one's.
    """
    split = [(*step_and_domain(label), found) for label, found in manifests.items()]
    shared = {step: found for step, of, found in split if not of and (not domain or step in SHARED_STEPS)}
    return shared | {step: found for step, of, found in split if of == domain}


def now() -> str:
    """The time, UTC, ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def versions() -> dict[str, str]:
    """The versions of the packages that a result may depend on, where they are installed."""
    found = {name: version for name in _VERSIONS if (version := installed_version(name))}
    return {"python": platform.python_version(), **found}


def installed_version(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_manifest(uri: str) -> Manifest | None:
    """The manifest in a step's directory, or None where the step is not done."""
    found = _read(Manifest, storage.join(uri, MANIFEST), "remove it, and the step runs again")
    return found.model_copy(update={"uri": uri}) if found else None


def write_manifest(manifest: Manifest) -> None:
    """The last write of a step."""
    storage.put_json(storage.join(manifest.uri, MANIFEST), manifest.model_dump(mode="json"))


def read_run(output: str) -> RunRecord:
    """The record of a run; empty where none was begun."""
    return _read(RunRecord, storage.join(output, RUN), "remove it, and the next `finescope run` writes it anew") or RunRecord()


def read_claim(uri: str) -> Claim | None:
    """Whose the step's directory is, or None where it is nobody's."""
    return _read(Claim, storage.join(uri, CLAIM), f"remove '{uri}', and the step runs again")


def write_claim(uri: str, claim: Claim) -> None:
    """The first write of a step."""
    storage.put_json(storage.join(uri, CLAIM), claim.model_dump(mode="json"))


def _read(kind: type[_Record], path: str, cure: str) -> _Record | None:
    if not storage.exists(path):
        return None
    try:
        return kind.model_validate(storage.read_json(path))
    except ValueError as error:  # not UTF-8, not JSON, or not such a record
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' is damaged or of another version of finescope: {cure} ({reason})") from error


def require_run(output: str) -> RunRecord:
    """The record of a run that must be there.

    Raises:
        UserError: there is none.
    """
    record = read_run(output)
    if not record.steps:
        raise UserError(f"no run at '{output}': it has no {RUN}")
    return record


def mark(output: str, step: str, state: StepState) -> None:
    """Put a step's state into `run.json`."""
    record = read_run(output)
    kind, domain = step_and_domain(step)
    # Of a directory that a run of one domain made and a domain of several took over, one label is left.
    other_form = {label for label, known in record.steps.items() if known.path == state.path and (label == kind) == bool(domain)}
    steps = {label: known for label, known in record.steps.items() if label != step and label not in other_form}
    steps |= {step: state}
    updated = RunRecord(finescope=installed_version("finescope") or "", steps=steps)
    storage.put_json(storage.join(output, RUN), updated.model_dump(mode="json"))


def manifest_of(output: str, step: str) -> Manifest:
    """The manifest of a done step of a run.

    Raises:
        UserError: the run has not done this step.
    """
    state = require_run(output).steps.get(step)
    manifest = read_manifest(storage.join(output, state.path)) if state else None
    if manifest is None:
        raise UserError(f"the run at '{output}' has not done step '{step}'")
    return manifest
