from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sae_corpus import reference_of_tiny, units_of_tiny
from tiny_run import write_inputs

from finescope.config import CorpusSection
from finescope.models.hooks import HookPoint, capture
from finescope.models.load import load_model
from finescope.sae import chunks as chunks_
from finescope.sae.chunks import CHUNK_DOCUMENTS, ChunkReader, plan_chunks
from finescope.sae.extract import Extractor, SiteColumns, activations_of, extract
from finescope.sae.stream import used_positions


def units(*rows: int) -> list[dict[str, Any]]:
    return [{"unit": number, "take": count} for number, count in enumerate(rows)]


@pytest.mark.parametrize("rows", [(5,), (1, 1), (1000, 3, 0, 40), (10_000, 10_000)])
def test_every_document_is_in_one_chunk(rows: tuple[int, ...]) -> None:
    covered: Counter[tuple[int, int]] = Counter()
    for chunk in plan_chunks(units(*rows), seed=0):
        assert chunk["count"] <= CHUNK_DOCUMENTS
        for row in range(chunk["first"], min(chunk["first"] + chunk["count"], rows[chunk["unit"]])):
            covered[chunk["unit"], row] += 1
    assert covered == Counter({(unit, row): 1 for unit, count in enumerate(rows) for row in range(count)})


def test_a_little_of_every_unit_comes_first() -> None:
    plan = plan_chunks(units(*[2560] * 50), seed=3)
    assert len(plan) == 500
    for turn in range(10):
        assert sorted(chunk["unit"] for chunk in plan[50 * turn : 50 * (turn + 1)]) == list(range(50))
    assert plan == plan_chunks(units(*[2560] * 50), seed=3)
    assert plan != plan_chunks(units(*[2560] * 50), seed=4)
    assert [chunk["first"] for chunk in plan[:50]] != [0] * 50


def test_no_more_chunks_are_planned_than_are_needed() -> None:
    whole = plan_chunks(units(*[2560] * 50), seed=3)
    assert plan_chunks(units(*[2560] * 50), seed=3, most=20_000) == whole[: -(-20_000 // CHUNK_DOCUMENTS)]
    assert plan_chunks(units(*[2560] * 50), seed=3, most=10**9) == whole


def test_chunks_that_are_not_full_count_for_what_they_hold() -> None:
    plan = plan_chunks(units(*[10] * 1000), seed=3, most=5000)
    assert sum(min(chunk["count"], 10 - chunk["first"]) for chunk in plan) == 5000
    assert len(plan) == 500


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("chunks"), documents=60)


def corpus_of(root: Path) -> CorpusSection:
    return CorpusSection.model_validate({"path": [str(root / "corpus" / "*.parquet")], "id": "id"})


def test_a_unit_is_read_once_while_memory_allows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = chunks_.read_documents

    def counting(unit: dict[str, Any], *arguments: Any) -> Any:
        read.append(unit["unit"])
        return original(unit, *arguments)

    monkeypatch.setattr(chunks_, "read_documents", counting)
    plan = plan_chunks(units_of_tiny(root), seed=0)
    assert len(plan) == 22  # twenty at least, and no chunk spans two units
    for kept, most in ((2**20, 1), (1, len(plan))):
        read.clear()
        monkeypatch.setattr(chunks_, "_KEPT_CHARACTERS", kept)
        reader = ChunkReader(reference_of_tiny(root), corpus_of(root), 32)
        documents = sum(len(ids) for chunk in plan for ids, _ in reader.batches(chunk))
        assert documents == 60
        assert max(Counter(read).values()) <= most
    assert len(read) > 4  # and is read anew where it does not


def test_extraction_is_capture_of_the_used_positions(root: Path, tmp_path: Path) -> None:
    reference, corpus = reference_of_tiny(root), corpus_of(root)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0][:5].astype(np.float32)
    sites = (
        SiteColumns(HookPoint(2), 32, np.array([1, 4, 30]), None),
        SiteColumns(HookPoint(1, "mlp_hidden"), 64, np.arange(64), basis),
    )
    chunk = plan_chunks(units_of_tiny(root), seed=0)[0]
    worker = Extractor(reference, corpus, 32, sites, cache=str(tmp_path / "cache"))
    found = activations_of(worker(pa.Table.from_pylist([chunk])))
    model, reader = load_model(reference), ChunkReader(reference, corpus, 32)
    expected = []
    for ids, mask in reader.batches(chunk):
        first, second = capture(model, torch.from_numpy(ids), torch.from_numpy(mask), [HookPoint(2), HookPoint(1, "mlp_hidden")])
        used = used_positions(torch.from_numpy(mask))
        expected.append(torch.cat([first[used][:, [1, 4, 30]], second[used] @ torch.from_numpy(basis).T], dim=1))
    np.testing.assert_array_equal(found, torch.cat(expected).numpy())
    (kept,) = (tmp_path / "cache").iterdir()
    again = Extractor(reference, corpus, 32, sites, cache=str(tmp_path / "cache"))
    np.testing.assert_array_equal(activations_of(again(pa.Table.from_pylist([chunk]))), found)
    assert again._loaded is None, "what is kept was computed again"
    assert kept.stat().st_size > 0


def test_documents_of_one_token_have_no_activation(root: Path) -> None:
    model = load_model(reference_of_tiny(root))
    batches = [(np.array([[5], [6]]), np.ones((2, 1), np.int64)), (np.array([[5, 6]]), np.ones((1, 2), np.int64))]
    (only,) = extract(model, batches, (SiteColumns(HookPoint(1), 32, np.arange(32), None),))
    assert only.shape == (1, 32)
