"""Which documents the screen learns from and is judged by."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import jsonl, section
from sae_corpus import reference_of_tiny
from tiny_run import write_model

from finescope import schemas, storage
from finescope.config import CorpusSection
from finescope.config_screen import ScreenSection
from finescope.corpus.files import resolve
from finescope.corpus.units import inspect_file
from finescope.curation.ngrams import hashed_ngrams
from finescope.curation.screen import Screen
from finescope.models.load import ModelReference
from finescope.stages.screen import draw
from finescope.stages.screen_units import NgramsOfSample, ScreenUnit

UNITS = [{"unit": number, "take": take} for number, take in enumerate([5, 1, 300, 44, 2000, 7])]
ROWS = sum(unit["take"] for unit in UNITS)


def places(units: list[dict]) -> set[tuple[int, int]]:
    found = [(unit["unit"], row) for unit in units for row in unit["rows"]]
    assert len(set(found)) == len(found)
    assert all(unit["rows"] == sorted(unit["rows"]) and 0 <= unit["rows"][0] <= unit["rows"][-1] < unit["take"] for unit in units)
    assert [unit["unit"] for unit in units] == sorted(unit["unit"] for unit in units)
    return set(found)


def test_sample_and_audit_have_no_document_in_common():
    sample, audit = (places(units) for units in draw(UNITS, ScreenSection(share=0.1, sample=400, audit=300)))
    assert (len(sample), len(audit), len(sample & audit)) == (400, 300, 0)
    again = [places(units) for units in draw(UNITS, ScreenSection(share=0.1, sample=400, audit=300))]
    assert again == [sample, audit]
    assert places(draw(UNITS, ScreenSection(share=0.1, sample=400, audit=300, seed=1))[0]) != sample


def test_every_document_is_as_likely():
    counts = np.zeros(len(UNITS))
    for seed in range(40):
        for unit in draw(UNITS, ScreenSection(sample=200, audit=10, share=0.1, seed=seed))[0]:
            counts[unit["unit"]] += len(unit["rows"])
    expected = 40 * 200 * np.array([unit["take"] for unit in UNITS]) / ROWS
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    assert (counts > 0).all()


@pytest.mark.parametrize(("sample", "audit"), [(100, 5000), (5000, 1), (ROWS, 1)])
def test_of_a_small_corpus_the_audit_is_all(sample: int, audit: int):
    found = draw(UNITS, ScreenSection(sample=sample, audit=audit, share=0.5))
    assert len(places(found[0])) == min(sample, ROWS)
    assert len(places(found[1])) == ROWS


def test_no_document_no_sample():
    assert draw([], ScreenSection()) == ([], [])


def test_its_actors_import_no_torch():
    code = "import sys, finescope.stages.screen_units; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def unit_of(corpus: CorpusSection) -> dict[str, Any]:
    """The first unit of a corpus as `limited_units` gives it."""
    (row,) = inspect_file(resolve(corpus)[0], corpus).documents.to_pylist()
    return row | {"unit": 0, "file_index": 0, "take": row["num_rows"], "name": "a.jsonl"}


def screen_unit(corpus: CorpusSection, model: ModelReference | None, uri: Path) -> tuple[dict[str, Any], pa.Table, pa.Table]:
    """Record, rows of `screened` and rejects of the first unit, held against a screen that wants the word `proof`."""
    weights = np.zeros((1, hashed_ngrams([], 1).num_latents), np.float32)
    weights[0, hashed_ngrams(["proof"], 10).ids] = 1.0
    screen = Screen(weights, np.zeros(1), np.array([0.1]), 1000)
    work = pa.Table.from_pylist([unit_of(corpus)])
    (record,) = ScreenUnit(screen, corpus, model, str(uri))(work).to_pylist(maps_as_pydicts="strict")
    assert storage.read_json(str(uri / "units" / "000000.json")) == record
    found = (pq.read_table(uri / name / "part-000000.parquet") for name in ("screened", "rejects"))
    return record, *found


def test_a_unit_has_a_row_a_document_and_a_reject_for_each_other_row(tmp_path: Path):
    lines = [{"text": "the proof"}, {"text": None}, {"text": "salt"}, b"not json", {"text": "a proof of it"}]
    record, screened, rejects = screen_unit(section(jsonl(tmp_path / "a.jsonl", *lines)), None, tmp_path / "out")
    assert screened.schema.equals(schemas.SCREENED)
    assert screened.column("row").to_pylist() == [0, 2, 4]
    assert [margin >= 0 for margin in screened.column("margin").to_pylist()] == [True, False, True]
    assert [(r["step"], r["row"], r["reason"]) for r in rejects.to_pylist()] == [
        ("screen", 1, "null_text"),
        ("screen", 3, "bad_json"),
    ]
    counts = {name: record[name] for name in ("rows_in", "rows", "rejects", "passed")}
    assert counts == {"rows_in": 5, "rows": 3, "rejects": 2, "passed": 2}


def test_messages_are_rendered_by_the_model_s_template(tmp_path: Path):
    write_model(tmp_path / "model")
    chats = [[{"role": "user", "content": content}] for content in ("proof", "oven")]
    lines = [*({"chat": chat} for chat in chats), {"chat": "none"}]
    corpus = section(jsonl(tmp_path / "a.jsonl", *lines), messages="chat")
    reference = reference_of_tiny(tmp_path)
    record, screened, rejects = screen_unit(corpus, reference, tmp_path / "out")
    assert (record["passed"], screened.num_rows, rejects.column("reason").to_pylist()) == (1, 2, ["bad_messages"])
    sampled = screened.slice(1)
    storage.put_parquet(str(tmp_path / "sampled.parquet"), sampled)
    work = pa.Table.from_pylist([unit_of(corpus) | {"sampled": str(tmp_path / "sampled.parquet")}])
    found = NgramsOfSample(corpus, reference, 1000)(work)
    expected = hashed_ngrams(["<|user|> oven <eos> "], 1000)
    assert found.column("ids")[0].as_py() == expected.ids.tolist()
    assert found.column("lengths")[0].as_py() == [len(expected.ids)]
