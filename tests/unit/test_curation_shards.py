"""The table workers of `score`: what they need, and the background that they draw."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from curation_codes import NUM_LATENTS, codes_from

from finescope import schemas, storage
from finescope.curation import contrast
from finescope.curation.codes import Codes, CorpusStatistics
from finescope.curation.shards import CODES, ShardCodes, ShardStatistics

WITHOUT_TORCH = (
    "finescope.curation.shards",
    "finescope.curation.score",
    "finescope.corpus.documents",
    "finescope.curation.select",
)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_an_actor_that_needs_no_model_imports_no_torch(module: str):
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == "[]"


def shard(path: Path, matrix: np.ndarray, first: int) -> dict[str, object]:
    codes = codes_from(matrix)
    rows = [
        {"doc_id": f"d{first + row}", "file": 0, "row_group": 0, "row": row, "num_tokens": 5, "fvu": 0.5}
        | dict(zip(("latent_ids", "latent_values"), (part.tolist() for part in codes.row(row)), strict=True))
        for row in range(len(codes))
    ]
    storage.put_parquet(str(path), schemas.conform(pa.Table.from_pylist(rows), schemas.EMBEDDINGS))
    return {"unit": first, "file": str(path)}


def test_sums_of_shards_are_those_of_the_corpus(tmp_path: Path):
    corpus = np.random.default_rng(0).integers(0, 3, (20, NUM_LATENTS)).astype(np.float64)
    worker = ShardStatistics(NUM_LATENTS, len(corpus), with_background=False)
    units = [shard(tmp_path / "a.parquet", corpus[:8], 0), shard(tmp_path / "b.parquet", corpus[8:], 8)]
    first, second = (worker(pa.Table.from_pylist([unit])) for unit in units)
    assert first.column("latent_ids").to_pylist() == [[]]
    found = CorpusStatistics.from_row(first.to_pylist()[0]) + CorpusStatistics.from_row(second.to_pylist()[0])
    expected = CorpusStatistics.of(codes_from(corpus))
    assert found.documents == expected.documents == 20
    np.testing.assert_allclose(found.sqrt_sum, expected.sqrt_sum)
    np.testing.assert_allclose(found.share_sum, expected.share_sum)
    assert found.active.tolist() == expected.active.tolist()


def test_the_background_is_drawn_by_id_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A quarter of 2,000 documents, the same whichever shards they are in."""
    monkeypatch.setattr(contrast, "BACKGROUND", 500)
    ids = [f"d{number}" for number in range(2000)]
    chosen = contrast.drawn(ids, 2000)
    assert 430 < chosen.sum() < 570  # 3.6 standard deviations of a binomial
    assert contrast.drawn(ids[::-1], 2000).tolist() == chosen[::-1].tolist()
    assert contrast.drawn(ids, 300).all(), "of a small corpus all"
    corpus = np.random.default_rng(0).integers(0, 3, (40, NUM_LATENTS)).astype(np.float64)
    row = ShardStatistics(NUM_LATENTS, 2000, with_background=True)(
        pa.Table.from_pylist([shard(tmp_path / "a.parquet", corpus, 100)])
    ).to_pylist()[0]
    places = np.flatnonzero(chosen[100:140])
    assert len(places) > 3
    assert row["latent_ids"] == [codes_from(corpus).row(place)[0].tolist() for place in places]


def test_codes_are_cut_and_joined():
    matrix = np.array([[1.0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0]])
    codes = codes_from(matrix)
    parts = list(codes.slices(2))
    assert [len(part) for part in parts] == [2, 1]
    joined = Codes.concatenated(parts)
    assert joined.dense().tolist() == matrix.tolist()


def test_codes_of_some_documents_are_those_of_the_shard(tmp_path: Path):
    corpus = np.random.default_rng(0).integers(1, 3, (6, NUM_LATENTS)).astype(np.float64)
    worker = ShardCodes(["d4", "d1", "elsewhere"])
    found = worker(pa.Table.from_pylist([shard(tmp_path / "a.parquet", corpus, 0)]))
    assert found.schema == CODES
    assert found.column("doc_id").to_pylist() == ["d1", "d4"]
    assert found.column("latent_values").to_pylist() == corpus[[1, 4]].tolist()
    none = worker(pa.Table.from_pylist([shard(tmp_path / "b.parquet", corpus, 10)]))
    assert (none.schema, none.num_rows) == (CODES, 0)
