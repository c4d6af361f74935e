"""S3 as it is: a real HTTP server, the real client, a corpus and an output on it, and a server that fails for a while."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cli_runs import SilentReporter, finescope, write_recipe
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from s3_server import make_bucket, serving, variables

from finescope import storage
from finescope.corpus.documents import read_documents
from finescope.errors import CorpusError
from finescope.runners.base import Context
from finescope.runners.local import LocalRunner
from finescope.stages.index import index
from finescope.stages.references import limited_units
from finescope.steps import Step, run

from corpus_files import section  # isort: skip


class Faults:
    """Answers of the server that are errors: (status, how many are left)."""

    status, left, given = 503, 0, 0


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as found:
        yield found


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URI of an empty bucket."""
    for name, value in variables(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield make_bucket(server, tmp_path.name.replace("_", "-").lower())
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    found = Faults()
    original: Callable[..., Iterable[bytes]] = DomainDispatcherApplication.__call__

    def call(self: Any, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if not found.left:
            return original(self, environ, start)
        found.left, found.given = found.left - 1, found.given + 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(f"{found.status} Trouble", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", call)
    return found


def rows(count: int) -> bytes:
    return b"".join(json.dumps({"id": str(at), "text": f"document {at}"}).encode() + b"\n" for at in range(count))


@pytest.mark.parametrize("status", [500, 503])
def test_a_corpus_and_an_output_on_s3_through_failing_answers(s3: str, faults: Faults, status: int) -> None:
    storage.put_bytes(f"{s3}/corpus/a.jsonl", rows(300))
    storage.put_bytes(f"{s3}/corpus/b.jsonl.gz", gzip.compress(rows(10).replace(b'"id": "', b'"id": "b')))
    corpus = section(f"{s3}/corpus/*", id="id", range_mib=4000 / 2**20)
    context = Context(LocalRunner(), SilentReporter())
    faults.status, faults.left = status, 2
    manifest = run(Step("index", {}), f"{s3}/run", lambda step: index(context, corpus, step))
    assert faults.given == 2, "the client asked again"
    assert storage.list_names(f"{s3}/run/index") == ["manifest.json", "step.json"]
    units = limited_units(manifest, None)
    assert len(units) > 2
    ids: list[str] = []
    for unit in units:
        faults.left = 2
        ids += read_documents(unit, corpus, unit["name"], None, None, "embed").table.column("doc_id").to_pylist()
    assert ids == [*map(str, range(300)), *(f"b{at}" for at in range(10))]
    storage.put_bytes(f"{s3}/corpus/a.jsonl", rows(301))
    with pytest.raises(CorpusError, match="has changed"):
        read_documents(units[0], corpus, units[0]["name"], None, None, "embed")


def test_without_credentials_it_is_one_line(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    values = {"output": str(tmp_path / "run"), "corpus": {"path": f"{s3}/a.jsonl"}}
    more = {"model": {"path": str(tmp_path)}, "seeds": {"path": str(tmp_path / "s.jsonl")}, "compute": {"runner": "local"}}
    ended = finescope("run", write_recipe(tmp_path / "r.yaml", {**values, **more}), "--until", "index")
    assert ended.code == 2
    assert ended.errors[0] == "finescope: Unable to locate credentials"
    assert "Traceback" not in ended.err
