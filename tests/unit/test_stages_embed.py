"""The step's worker: two threads write what one writes; records on storage are those that come back."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sae_corpus import reference_of_tiny, units_of_tiny
from test_curation_embed import dictionary
from tiny_run import write_inputs

from finescope import storage
from finescope.config import CorpusSection, EmbedSection
from finescope.sae.dictionary import save_dictionary
from finescope.stages.embed import UNITS_AT_ONCE, EmbedUnit


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("stage"), documents=90, rows_per_group=12)


def embed_units(root: Path, name: str, threads: int) -> list[dict[str, Any]]:
    """The records of all units, embedded into `root / name`."""
    save_dictionary(str(root / "dictionary"), dictionary("residual", "topk"))
    corpus = CorpusSection.model_validate({"path": str(root / "corpus"), "id": "id"})
    section = EmbedSection(max_tokens=32, keep_latents=12, batch_tokens=64)
    worker = EmbedUnit(reference_of_tiny(root), str(root / "dictionary"), corpus, section, str(root / name))
    units = [pa.Table.from_pylist([unit | {"file_index": 0}]) for unit in units_of_tiny(root)]
    with ThreadPoolExecutor(threads) as pool:
        return [table.to_pylist(maps_as_pydicts="strict")[0] for table in pool.map(worker, units)]


def test_threads_of_a_worker_write_what_one_writes(root: Path) -> None:
    alone, together = embed_units(root, "alone", 1), embed_units(root, "together", UNITS_AT_ONCE)
    assert len(alone) == len(units_of_tiny(root)) > UNITS_AT_ONCE
    assert together == alone
    files = sorted((root / "alone" / "embeddings").iterdir())
    assert len(files) == len(alone)
    for file in files:
        assert file.read_bytes() == (root / "together" / "embeddings" / file.name).read_bytes()
    assert sum(pq.read_metadata(file).num_rows for file in files) == sum(record["rows"] for record in alone) == 90


def test_the_record_on_storage_is_the_one_that_comes_back(root: Path) -> None:
    records = embed_units(root, "recorded", 1)
    assert [storage.read_json(str(root / "recorded" / "units" / f"{record['unit']:06d}.json")) for record in records] == records
