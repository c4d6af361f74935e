import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from curate_inputs import run_curate, write_inputs

from finescope.analysis.frames import frame_of
from finescope.curation import select, staging
from finescope.errors import StepFailed
from finescope.manifest import Manifest
from finescope.stages import curate as stage
from finescope.stages.references import read_shards
from finescope.steps import Step

DOCUMENTS = 60
SCORES = [round(0.99 - 0.01 * ((7 * row) % DOCUMENTS), 2) for row in range(DOCUMENTS)]


def text(row: int) -> str:
    return f"document {row} tells of " + " ".join(f"thing{row * 31 + at}" for at in range(12))


def corpus(changes: dict[int, str] | None = None) -> list[pa.Table]:
    """Sixty documents in three files; the second file has a column more, the third has numbers where the first has words."""
    texts = [(changes or {}).get(row, text(row)) for row in range(DOCUMENTS)]
    ids = [f"d{row:02d}" for row in range(DOCUMENTS)]
    parts = []
    for number, start in enumerate((0, 20, 40)):
        span = slice(start, start + 20)
        more: dict[str, list[object]] = {"level": [number] * 20 if number == 2 else ["easy"] * 20}
        if number == 1:
            more["author"] = ["someone"] * 20
        parts.append(pa.table({"id": ids[span], "text": texts[span], **more}))
    return parts


def best_first() -> list[int]:
    return sorted(range(DOCUMENTS), key=lambda row: (-SCORES[row], row))


def curated(manifest: Manifest) -> pl.DataFrame:
    return frame_of(manifest, "curated").collect()


def reasons(manifest: Manifest) -> dict[str, tuple[str, str]]:
    return {row["doc_id"]: (row["reason"], row["detail"]) for row in frame_of(manifest, "rejects").collect().to_dicts()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Step]]:
    """The corpus as it is, for tests that only differ in their section."""
    root = tmp_path_factory.mktemp("plain")
    return root, write_inputs(root, corpus(), SCORES, 10)


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and parts of seven rows."""
    monkeypatch.setattr(staging, "PART_ROWS", 7)
    monkeypatch.setattr(stage, "PART_ROWS", 7)


@pytest.mark.usefixtures("shards")
def test_several_shards_of_one_schema_in_order_of_rank(tmp_path: Path) -> None:
    manifest = run_curate(tmp_path, write_inputs(tmp_path, corpus(), SCORES, 10), documents=25)
    files = [pq.ParquetFile(path) for path in manifest.files("curated")]
    assert [file.metadata.num_rows for file in files] == [7, 7, 7, 4]
    assert len({str(file.schema_arrow) for file in files}) == 1
    table = read_shards(manifest, "curated")
    assert table.column_names == ["rank", "doc_id", "score", "seed", "id", "level", "author", "text"]
    assert table.column("rank").to_pylist() == list(range(1, 26))
    expected = best_first()[:25]
    assert table.column("doc_id").to_pylist() == [f"d{row:02d}" for row in expected]
    assert table.column("text").to_pylist() == [text(row) for row in expected]
    assert table.column("level").to_pylist() == ["2" if row >= 40 else "easy" for row in expected]
    assert table.column("author").to_pylist() == ["someone" if 20 <= row < 40 else None for row in expected]
    assert read_shards(manifest, "curated", ["rank"], 9).column("rank").to_pylist() == list(range(1, 10))
    assert sorted(path.name for path in (tmp_path / "run" / "curate").iterdir()) == [
        *("README.md", "curated", "manifest.json", "step.json"),
    ]


@pytest.mark.usefixtures("shards")
def test_the_walk_goes_on_until_enough_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best forty are one text: what was read at first does not suffice."""
    same = {row: "One and the SAME text" if row % 2 else "one and  the same text" for row in best_first()[:40]}
    read: list[int] = []
    best = stage.Ranking.best
    monkeypatch.setattr(stage.Ranking, "best", lambda self, most: (read.append(most), best(self, most))[1])
    monkeypatch.setattr(select, "SPARE", 0)
    manifest = run_curate(tmp_path, write_inputs(tmp_path, corpus(same), SCORES), documents=10)
    assert read == [0, 11, 21, 41, 60]
    kept = [best_first()[0], *best_first()[40:49]]
    assert curated(manifest)["doc_id"].to_list() == [f"d{row:02d}" for row in kept]
    assert (manifest.rows_in, manifest.rows_out, manifest.rejects) == (49, 10, 39)
    assert set(reasons(manifest).values()) == {("duplicate", f"of d{kept[0]:02d}")}


def test_every_reject_says_what_it_hit(tmp_path: Path) -> None:
    order = best_first()
    question = "What is the sum of all numbers from one to ninety nine if every third is left out?"
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"id": "q7", "question": question, "choices": ["a", "b"]}) + "\n")
    changes = {
        order[2]: text(order[0]).upper(),
        order[3]: text(order[1]) + " word",
        order[4]: f"Q: {question.lower().replace(' ', '  ')} Tell me.",
    }
    inputs = write_inputs(tmp_path, corpus(changes), SCORES)
    values = {"documents": 6, "decontaminate": [str(items)], "duplicate_jaccard": 0.7}
    manifest = run_curate(tmp_path, inputs, **values)
    found = reasons(manifest)
    shared, union = 12, 13  # of the five-word shingles: the other text has one more
    assert found == {
        f"d{order[2]:02d}": ("duplicate", f"of d{order[0]:02d}"),
        f"d{order[3]:02d}": ("near_duplicate", f"of d{order[1]:02d}, similarity {shared / union:.3f}"),
        f"d{order[4]:02d}": (
            "contaminated",
            "items.jsonl, row 0 (id q7), question: what is the sum of all numbers from one to ninety nine if",
        ),
    }
    assert manifest.facts["reasons"] == {"contaminated": 1, "duplicate": 1, "near_duplicate": 1}
    exact = run_curate(tmp_path, inputs, **(values | {"deduplicate": "exact"}))
    assert sorted(reason for reason, _ in reasons(exact).values()) == ["contaminated", "duplicate"]
    none = run_curate(tmp_path, inputs, **(values | {"deduplicate": False}))
    assert [reason for reason, _ in reasons(none).values()] == ["contaminated"]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"share": 0.2}, 12),
        ({"tokens": 95}, 9),
        ({"threshold": 0.8}, 20),
        ({"threshold": 0.8, "share": 0.2, "tokens": 95}, 9),
        ({"documents": 5, "threshold": 0.8, "share": 0.2, "tokens": 95}, 5),
        ({"documents": None, "share": 1.0}, 60),
        ({"per_seed": 2}, 6),
    ],
)
def test_limits(plain: tuple[Path, dict[str, Step]], values: dict[str, float], kept: int) -> None:
    manifest = run_curate(*plain, **values)
    assert curated(manifest)["score"].len() == kept == manifest.rows_out
    assert manifest.facts["lowest_score"] == curated(manifest)["score"].min()
    assert manifest.facts["tokens"] == 10 * kept


def walked(order: list[int], seed_of: list[int], same: dict[int, int], quota: int, documents: int) -> list[int]:
    """What a walk down the whole ranking keeps; `same` says which document's text a document has."""
    kept: list[int] = []
    for row in order:
        if len(kept) == documents:
            break
        new = same.get(row, row) not in [same.get(other, other) for other in kept]
        if new and sum(seed_of[other] == seed_of[row] for other in kept) < quota:
            kept.append(row)
    return kept


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the documents whose text is read."""
    found: list[str] = []
    read = stage.read_selected

    def recorded(*arguments: Any) -> pa.Table:
        table = read(*arguments)
        found.extend(table.column("id").to_pylist())
        return table

    monkeypatch.setattr(stage, "read_selected", recorded)
    monkeypatch.setattr(select, "SPARE", 0)
    return found


def test_a_rare_seed_does_not_cost_the_corpus(tmp_path: Path, rows_read: list[str]) -> None:
    """Of the third seed there are the eleventh and the last but ten: of the others no text is read any more."""
    order = best_first()
    seed_of = [0] * DOCUMENTS
    for rank, row in enumerate(order):
        seed_of[row] = 2 if rank in (10, 50) else rank % 2
    inputs = write_inputs(tmp_path, corpus(), SCORES, seed_of=seed_of)
    manifest = run_curate(tmp_path, inputs, per_seed=3)
    assert curated(manifest)["doc_id"].to_list() == [f"d{order[rank]:02d}" for rank in (0, 1, 2, 3, 4, 5, 10, 50)]
    assert sorted(rows_read) == sorted(f"d{order[rank]:02d}" for rank in (*range(11), 50))
    assert (manifest.rows_in, manifest.facts["reasons"]) == (12, {"per_seed": 4})


@pytest.mark.parametrize("number", range(2))
def test_quotas_are_those_of_a_walk_over_everything(tmp_path: Path, number: int, rows_read: list[str]) -> None:
    random = np.random.default_rng(number)
    seed_of = random.choice(3, DOCUMENTS, p=[0.8, 0.15, 0.05]).tolist()
    same = {int(row): int(random.integers(0, 4)) for row in random.choice(np.arange(4, DOCUMENTS), 30, replace=False)}
    inputs = write_inputs(tmp_path, corpus({row: text(of) for row, of in same.items()}), SCORES, seed_of=seed_of)
    for quota, documents in ((3, 1000), (5, 12), (20, 30)):
        manifest = run_curate(tmp_path, inputs, per_seed=quota, documents=documents, deduplicate="exact")
        expected = walked(best_first(), seed_of, same, quota, min(documents, 3 * quota))
        assert curated(manifest)["doc_id"].to_list() == [f"d{row:02d}" for row in expected]
        assert manifest.rows_in == manifest.rows_out + manifest.rejects


def test_a_diverse_set_has_as_many_as_the_quotas_allow(tmp_path: Path) -> None:
    order = best_first()
    seed_of = [int(order.index(row) >= 45) for row in range(DOCUMENTS)]
    inputs = write_inputs(tmp_path, corpus(), SCORES, seed_of=seed_of)
    manifest = run_curate(tmp_path, inputs, documents=10, per_seed=5, diversity=0.5)
    assert curated(manifest)["seed"].value_counts().sort("seed").rows() == [(0, 5), (1, 5)]
    assert manifest.rows_in == manifest.rows_out + manifest.rejects
    assert ("per_seed", "seed 0 has 20 better ones") in reasons(manifest).values()


def test_nothing_left_is_an_error(plain: tuple[Path, dict[str, Step]]) -> None:
    for values in ({"threshold": 1.5}, {"tokens": 9}):
        with pytest.raises(StepFailed, match="no document was kept"):
            run_curate(*plain, **values)


def test_a_diverse_set_is_less_alike(plain: tuple[Path, dict[str, Step]]) -> None:
    best, diverse = (run_curate(*plain, documents=10, diversity=value) for value in (0.0, 0.8))
    assert curated(diverse)["doc_id"][0] == curated(best)["doc_id"][0], "the first one has nothing to be unlike"
    assert curated(diverse)["rank"].to_list() == list(range(1, 11))
    assert set(curated(diverse)["doc_id"]) != set(curated(best)["doc_id"])
    assert set(curated(diverse)["doc_id"]) <= {f"d{row:02d}" for row in best_first()[:40]}, "four times as many"
    assert (diverse.rows_in, diverse.rejects, diverse.facts["reasons"]) == (40, 30, {"diversity": 30})


def test_an_attempt_that_was_killed_leaves_nothing(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, corpus(), SCORES, 10)
    step = tmp_path / "run" / "curate"
    for name in ("curated/part-000009.parquet", "rejects/part-000000.parquet", ".tmp-left/tree/part-000000.arrow"):
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(b"of an attempt that was killed")
    manifest = run_curate(tmp_path, inputs, documents=5)
    assert [path.name for path in (step / "curated").iterdir()] == ["part-000000.parquet"]
    assert not (step / "rejects").exists()
    assert not list(step.glob(".tmp-*"))
    assert manifest.rejects == 0


@pytest.mark.usefixtures("shards")
def test_the_directory_is_a_dataset(tmp_path: Path) -> None:
    manifest = run_curate(tmp_path, write_inputs(tmp_path, corpus({1: text(0)}), SCORES), documents=25)
    loaded = datasets.load_dataset(manifest.uri, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded, datasets.Dataset)
    assert loaded["doc_id"][:] == curated(manifest)["doc_id"].to_list()
    assert pl.scan_parquet(Path(manifest.uri) / "curated").collect().equals(curated(manifest))
    card = (Path(manifest.uri) / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "unknown"
    assert front["size_categories"] == ["n<1K"]
    for said in ("25 of 60 documents", "| rejected: duplicate | 1 |", "| seeds | 3 |", "0.7400 to 0.9900", '"num_latents": 64'):
        assert said in card
    for silent in ("tells of", "/models/", str(tmp_path)):
        assert silent not in card


def test_columns_of_any_name_come_through(tmp_path: Path) -> None:
    """A filter's findings lie beside the columns of the source while rows are put by."""
    more = {name: [f"{name} {row}" for row in range(20)] for name in ("hash", "item", "sketch")}
    tables = [pa.table({**{name: part.column(name) for name in ("id", "text")}, **more}) for part in corpus()]
    manifest = run_curate(tmp_path, write_inputs(tmp_path, tables, SCORES, 10), documents=8)
    found = curated(manifest)
    assert found.columns == ["rank", "doc_id", "score", "seed", "id", "hash", "item", "sketch", "text"]
    assert found["item"].to_list() == [f"item {row % 20}" for row in best_first()[:8]]
