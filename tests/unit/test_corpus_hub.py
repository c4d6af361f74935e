"""Datasets on the hub: what a name resolves to, at which commit, and what is said where it cannot be read."""

import io
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import SilentReporter, ended, finescope, start, write_recipe
from corpus_files import section, texts
from hub_server import Hub, serving
from huggingface_hub import HfFileSystem, constants

from finescope import storage
from finescope.corpus.documents import read_documents
from finescope.corpus.files import resolve
from finescope.errors import CorpusError
from finescope.runners.base import Context
from finescope.runners.local import LocalRunner
from finescope.stages.index import index
from finescope.stages.references import limited_units
from finescope.steps import Step, run


def parquet(*texts: str, rows_per_group: int = 1000) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), buffer, row_group_size=rows_per_group)
    return buffer.getvalue()


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def _addresses(endpoint: str) -> dict[str, str]:
    """What the client makes of HF_ENDPOINT when it is imported."""
    return {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that the client of this process asks: HF_ENDPOINT counts only before it is imported."""
    HfFileSystem.clear_instance_cache()
    with serving() as found:
        for name, value in _addresses(found.url).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found
    HfFileSystem.clear_instance_cache()


def names(pattern: str, **settings: object) -> list[str]:
    """What a pattern resolves to: COMMIT/PATH, the commit by its first five digits."""
    found = [file.info.path.removeprefix("hf://datasets/o/d@") for file in resolve(section(pattern, **settings))]
    return [f"{name[:5]}{name[40:]}" for name in found]


def test_a_repository_is_its_parquet_files_at_the_commit_of_now(hub: Hub) -> None:
    files = {
        "README.md": b"about",
        "data/train-0.parquet": parquet("a"),
        "data/test-0.parquet": parquet("b"),
        "x.jsonl": jsonl("c"),
    }
    repository = hub.repository("o/d")
    first = repository.commit(files)
    other = repository.commit({"old.parquet": parquet("d")}, "a/branch")
    hub.page = 2
    assert names("hf://datasets/o/d") == [f"{first[:5]}/data/test-0.parquet", f"{first[:5]}/data/train-0.parquet"]
    assert names("hf://datasets/o/d/data/train-*.parquet") == [f"{first[:5]}/data/train-0.parquet"]
    assert names("hf://datasets/o/d/data/train-0.parquet") == [f"{first[:5]}/data/train-0.parquet"]
    assert names(f"hf://datasets/o/d@{first}/*.jsonl") == [f"{first[:5]}/x.jsonl"]
    assert names("hf://datasets/o/d@a%2Fbranch") == [f"{other[:5]}/old.parquet"]
    assert names("hf://datasets/o/d/data") == names("hf://datasets/o/d"), "a folder"
    assert texts(section("hf://datasets/o/d")) == ["b", "a"]
    assert texts(section("hf://datasets/o/d/x.jsonl")) == ["c"]


def test_without_parquet_it_is_the_hub_s_conversion(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    repository = hub.repository("o/d")
    repository.commit({"raw.csv": b"text\na\n"})
    folders = ("default/train", "default/test", "big/partial-train", "big/test")
    converted = repository.commit({f"{folder}/0000.parquet": parquet(folder) for folder in folders}, "refs/convert/parquet")[:5]
    with caplog.at_level(logging.WARNING):
        assert names("hf://datasets/o/d/default") == [
            f"{converted}/default/test/0000.parquet",
            f"{converted}/default/train/0000.parquet",
        ]
        assert names("hf://datasets/o/d/default/train") == [f"{converted}/default/train/0000.parquet"]
        assert names("hf://datasets/o/d@~parquet/default/train") == [f"{converted}/default/train/0000.parquet"]
        assert names("hf://datasets/o/d@refs/convert/parquet/*/test/*") == [
            f"{converted}/{c}/test/0000.parquet" for c in ("big", "default")
        ]
        assert not caplog.messages
        assert names("hf://datasets/o/d/big/train") == [f"{converted}/big/partial-train/0000.parquet"]
        assert "only the first part of: big/partial-train" in caplog.messages[-1]
        assert len(names("hf://datasets/o/d")) == len(names("hf://datasets/o/d@~parquet")) == 4
        assert len(caplog.messages) == 3, "of all that is there a part is partial"
    assert names("hf://datasets/o/d/raw.csv")[0].endswith("/raw.csv")
    assert texts(section("hf://datasets/o/d/default/train")) == ["default/train"]


def test_what_is_not_there_is_told(hub: Hub) -> None:
    hub.repository("o/empty").commit({"README.md": b""})
    hub.repository("o/converted").commit({"a.csv": b""})
    hub.repository("o/converted").commit({"default/train/0.parquet": parquet("a")}, "refs/convert/parquet")
    hub.repository("o/converted").commit({"b.csv": b""}, "old")
    for uri, said in {
        "hf://datasets/o/none": "the hub has no such dataset, or it is private and HF_TOKEN is not",
        "hf://datasets/o/empty": "no Parquet file in the repository, and the hub has not converted it",
        "hf://datasets/o/empty@v9": "the dataset has no revision 'v9'",
        "hf://datasets/o/empty/*.parquet": "corpus.path: no file matches 'hf://datasets/o/empty/*.parquet'",
        "hf://datasets/o/converted/a/b": "no 'a/b' in the repository, and its conversion to Parquet has: default/train",
        "hf://datasets/o/converted@old": "no Parquet file in the repository at 'old'",
        "hf://datasets/squad": "expected hf://datasets/OWNER/NAME[@REVISION][/PATH]",
        "hf://datasets/o/d@": "expected hf://datasets/OWNER/NAME[@REVISION][/PATH]",
    }.items():
        with pytest.raises(CorpusError) as raised:
            resolve(section(uri))
        assert str(raised.value).startswith("corpus.path: ")
        assert uri in str(raised.value)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_gated_dataset_needs_the_token_of_a_reader(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("o/d", gated=True).commit({"a.parquet": parquet("a")})
    with pytest.raises(CorpusError, match=r"is gated: accept its terms at http://127.*/datasets/o/d and set HF_TOKEN"):
        resolve(section("hf://datasets/o/d"))
    hub.token = "hf_reader"
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert texts(section("hf://datasets/o/d")) == ["a"]


def test_no_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    HfFileSystem.clear_instance_cache()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CorpusError, match=rf"the hub at {nobody} \(HF_ENDPOINT\) cannot be reached: .*refused"):
        resolve(section("hf://datasets/o/d"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="HF_HUB_OFFLINE is set"):
        resolve(section("hf://datasets/o/d"))


def test_the_commit_of_the_index_is_read_for_good(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repository("o/d")
    documents = [f"document {at}" for at in range(50)]
    commit = repository.commit({"data/a.parquet": parquet(*documents, rows_per_group=10), "data/b.jsonl": jsonl(*documents)})
    corpus = section(["hf://datasets/o/d", "hf://datasets/o/d/data/b.jsonl"], range_mib=300 / 2**20)
    context = Context(LocalRunner(), SilentReporter())
    manifest = run(Step("index", {}), str(tmp_path / "run"), lambda step: index(context, corpus, step))
    assert manifest.facts["commits"] == [f"hf://datasets/o/d@{commit}"]
    units = limited_units(manifest, None)
    assert {unit["etag"] for unit in units if unit["name"] == "a.parquet"} == {storage.info(units[0]["file"]).etag}
    repository.commit({"data/a.parquet": parquet("another"), "data/b.jsonl": jsonl("another")})
    HfFileSystem.clear_instance_cache()
    hub.requests.clear()
    read = [read_documents(unit, corpus, unit["name"], None, None, "embed").table.column("text") for unit in units]
    assert [text for column in read for text in column.to_pylist()] == documents * 2
    assert not [asked for asked in hub.requests if "main" in asked]
    listings = [asked for asked in hub.requests if "/tree/" in asked]
    assert len(listings) == 1, "of a folder of a commit one listing is enough"


def test_a_process_asks_the_endpoint_of_its_environment() -> None:
    code = (
        "import sys; from finescope.corpus.files import resolve_paths as r; print(r(sys.argv[1:], 'auto', 'corpus.path')[0].info)"
    )
    with serving() as hub:
        commit = hub.repository("o/d").commit({"a.parquet": parquet("a")})
        found = ended(start(["hf://datasets/o/d"], code, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0"))
    assert f"path='hf://datasets/o/d@{commit}/a.parquet'" in found.out, found.err


def test_the_command_line_tells_it_in_one_line(hub: Hub, tmp_path: Path) -> None:
    values = {"output": str(tmp_path / "run"), "corpus": {"path": "hf://datasets/o/d"}, "compute": {"runner": "local"}}
    values |= {"model": {"path": str(tmp_path)}, "seeds": {"path": str(tmp_path / "s.jsonl")}}
    gone = finescope("run", write_recipe(tmp_path / "r.yaml", values), "--until", "index")
    assert gone.code == 2
    (line,) = gone.errors
    assert line.startswith("finescope: corpus.path: 'hf://datasets/o/d': the hub has no such dataset, or it is private")
    assert not (tmp_path / "run").exists()
