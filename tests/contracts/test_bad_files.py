"""The contract's table of bad input: files of the corpus. Every row has its fate, and the counts add up."""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_inputs import Case, refused
from cli_runs import states
from tiny_run import rows, write_inputs

from finescope.analysis import frames

LONG = "salt " * 2_000_000  # ten million characters
QUITE_LONG = "salt " * 50_000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), documents=80)


def lines(found: Sequence[dict[str, Any] | bytes]) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in found)


def zst(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def parquet(path: Path, columns: dict[str, Any]) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


def spoilt(folder: Path) -> dict[str, Counter[str]]:
    """A corpus with one of everything; the reasons of each file's rejects, and "document" for what is one."""
    folder.mkdir()
    good = rows(90)
    words = lines([{"text": row["text"]} for row in rows(200, seed=1)])
    random = [f"{row['text']} {at}".encode() for at, row in enumerate(rows(200, seed=2))]
    days = pa.array([86_400 * at for at in range(5)], pa.timestamp("s"))
    lists = pa.array([["a list"], None, [], ["of", "words"]], pa.list_(pa.string()))
    structs = pa.array([{"role": "user"}, None], pa.struct([("role", pa.string())]))
    jsonl = [{"text": "salt and soup"}, {"text": None}, {"text": " \t"}, {"other": 1}, b'{"text": "\xe9t\xe9"}', {"text": LONG}]
    jsonl += [{"text": ["a", "list"]}, {"text": {"an": "object"}}, b'{"text": "cut', b"[1]", {"text": 7}, {"text": "a sum"}]
    parquet(folder / "good.parquet", {"text": [row["text"] for row in good], "source": [row["source"] for row in good]})
    parquet(folder / "days.parquet", {"text": days, "source": [[1], [2], [3], [4], [5]]})
    parquet(folder / "lists.parquet", {"text": lists})
    parquet(folder / "structs.parquet", {"more": [1, 2], "text": structs})
    parquet(folder / "none.parquet", {"text": pa.array([], pa.string())})
    parquet(folder / "nulls.parquet", {"text": pa.nulls(3)})
    parquet(folder / "bytes.parquet", {"text": pa.array([b"salt and soup", b"\xff\xfe", None, b""], pa.binary())})
    whole = parquet(folder / "cut.parquet", {"text": random})
    (folder / "cut.parquet").write_bytes(half(whole))
    (folder / "headless.parquet").write_bytes(b"")
    (folder / "lines.jsonl").write_bytes(lines(jsonl))
    (folder / "cut.jsonl.gz").write_bytes(half(gzip.compress(words)))
    (folder / "cut.jsonl.zst").write_bytes(half(zst(words)))
    (folder / "cut.csv.gz").write_bytes(half(gzip.compress(b"text\n" + b"\n".join(random))))
    (folder / "plain.jsonl.gz").write_bytes(words[:5000])
    (folder / "fields.csv").write_bytes(b"text,n\nsalt and soup,1\nonly\nsalt,and,soup\n\xff and salt,4\n")
    (folder / "latin.txt").write_bytes("été".encode("latin-1"))
    (folder / "whole.jsonl.zst").write_bytes(zst(words))
    of_lines = {"document": 2, "null_text": 2, "empty_text": 1, "not_utf8": 1, "too_long": 1, "not_text": 2, "bad_json": 2}
    found = {
        "good.parquet": {"document": 90},
        "days.parquet": {"document": 5},
        "lists.parquet": {"not_text": 3, "null_text": 1},
        "structs.parquet": {"not_text": 1, "null_text": 1},
        "nulls.parquet": {"null_text": 3},
        "bytes.parquet": {"document": 1, "not_utf8": 1, "null_text": 1, "empty_text": 1},
        "lines.jsonl": of_lines | {"too_short": 1},
        "fields.csv": {"document": 1, "bad_csv": 2, "not_utf8": 1},
        "latin.txt": {"not_utf8": 1},
        "whole.jsonl.zst": {"document": 200},
        **{name: {"unreadable_file": 1} for name in ("cut.parquet", "headless.parquet", "plain.jsonl.gz")},
        **{name: {"unreadable_file": 1} for name in ("cut.jsonl.gz", "cut.jsonl.zst", "cut.csv.gz")},
    }
    return {name: Counter(reasons) for name, reasons in found.items()}


def test_every_row_of_every_file_has_its_fate(inputs: Path, tmp_path: Path) -> None:
    expected = spoilt(tmp_path / "corpus")
    corpus = {"path": str(tmp_path / "corpus"), "id": None, "max_reject_rate": 0.5}
    # The first documents, which other coordinates would be chosen by, are nearly all rejected.
    case = Case(inputs, tmp_path, corpus=corpus, sae={"coordinates": {"method": "random", "count": 24}})
    ended = case.run("--until", "embed")
    assert ended.code == 0, ended.err
    run = str(case.output)
    units = frames.table(run, "documents").collect()
    files = list(dict.fromkeys(units["file"]))
    found: dict[str, Counter[str]] = {Path(file).name: Counter() for file in files}
    for number in frames.table(run, "embeddings").collect()["file"]:
        found[Path(files[number]).name]["document"] += 1
    rejects = frames.table(run, "rejects").collect()
    for file, reason in rejects.select("file", "reason").iter_rows():
        found.setdefault(Path(file).name, Counter())[reason] += 1
    assert {name: reasons for name, reasons in found.items() if reasons} == expected
    assert rejects["detail"].is_not_null().all()
    manifest = json.loads((case.output / "embed" / "manifest.json").read_text())
    counted = sum(sum(reasons.values()) - reasons["unreadable_file"] for reasons in expected.values())
    assert manifest["rows_in"] == units["num_rows"].sum() == counted == manifest["rows_out"] + manifest["rejects"]
    assert rejects.filter(pl.col("reason") == "too_long")["detail"].to_list() == [
        f"{len(LONG.strip()):,} characters; corpus.max_characters is 200,000"
    ]


def test_a_recipe_may_allow_what_is_long(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "lines.jsonl").write_bytes(lines([*rows(90), {"id": "long", "text": QUITE_LONG, "source": "one"}]))
    case = Case(inputs, tmp_path, corpus={"path": str(folder), "max_characters": len(QUITE_LONG)}, curate={"documents": 91})
    ended = case.run("--until", "curate")
    assert ended.code == 0, ended.err
    embedded = frames.table(str(case.output), "embeddings").filter(pl.col("doc_id") == "long").collect()
    assert embedded["num_tokens"].to_list() == [case.values["embed"]["max_tokens"]]
    curated = frames.table(str(case.output), "curated").filter(pl.col("doc_id") == "long").collect()
    assert curated["text"].to_list() == [QUITE_LONG.strip()]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"id": ["x"], "body": ["salt"]}, ("b.parquet' has no column 'text'; it has: id, body",)),
        ({"text": ["salt"]}, ("b.parquet' has no column 'id'; it has: text",)),
        ({"id": [2], "text": ["salt and soup"]}, ("corpus.id: column 'id' is not unique: 1 ids", "'2' (2 times)")),
        ({"id": ["2"], "text": [["salt"]]}, ("corpus.id: column 'id' is not unique: 1 ids", "'2' (2 times)")),
    ],
)
def test_a_file_that_does_not_go_with_the_others(
    inputs: Path, tmp_path: Path, second: dict[str, list[object]], said: tuple[str, ...]
) -> None:
    parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "text": ["salt and soup"] * 3})
    parquet(tmp_path / "b.parquet", second)
    case = Case(inputs, tmp_path, corpus={"path": [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]})
    refused(case.run("--until", "embed"), *said)
    assert not case.output.exists() or states(case.output) == {"index": "failed"}
