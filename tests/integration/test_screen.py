"""A run behind a screen, on a tiny model: what passes, what is measured of what it stops, and that a kill costs little."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from cli_runs import SilentReporter, finescope, leftovers, stamps, write_recipe
from tiny_run import recipe_values, write_inputs

from finescope import pipeline, storage
from finescope.config import Recipe
from finescope.manifest import Manifest

_DOCUMENTS = 240
# Half of the corpus is learned from, the rest is the audit.
_SCREEN = {"sample": 120, "audit": 60, "top": 0.2, "recall": 0.9}
_TWENTIETH = {"documents": None, "share": 0.05, "deduplicate": False}
_TABLES = (("screen", "screened"), ("screen", "sampled"), ("screen", "audited"), ("embed", "embeddings"), ("curate", "curated"))


class Killed(BaseException):
    """What nothing catches."""


class Heard(SilentReporter):
    """Remembers the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """See `Reporter`."""
        self.warnings.append(message)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield write_inputs(tmp_path_factory.mktemp("screen"), documents=_DOCUMENTS, rows_per_group=20)
    torch.set_num_threads(threads)


def values(root: Path, name: str, screen: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    return {**recipe_values(root, name, **changes), "screen": screen, "evaluate": {}}


def run(
    root: Path, name: str, screen: dict[str, Any] | None, reporter: SilentReporter | None = None, **changes: Any
) -> dict[str, Manifest]:
    """A run up to `curate`; the dictionary is the first run's."""
    first = root / "runs" / "plain"
    for step in ("index", "model", "sae") if first.exists() else ():
        shutil.copytree(first / step, root / "runs" / name / step, dirs_exist_ok=True)
    return pipeline.run(Recipe.model_validate(values(root, name, screen, **changes)), reporter or SilentReporter(), "curate")


@pytest.fixture(scope="module")
def plain(root: Path) -> dict[str, Manifest]:
    return run(root, "plain", None)


@pytest.fixture(scope="module")
def screened(root: Path, plain: dict[str, Manifest]) -> dict[str, Manifest]:
    return run(root, "screened", _SCREEN)


def read(manifests: dict[str, Manifest], step: str, table: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in manifests[step].files(table)])


def test_without_the_section_there_is_no_such_step(plain: dict[str, Manifest]) -> None:
    assert list(plain) == ["index", "model", "sae", "embed", "score", "curate"]


def test_where_all_pass_nothing_changes(root: Path, plain: dict[str, Manifest]) -> None:
    found = run(root, "all", {"share": 1.0})
    assert (found["screen"].facts["passed"], found["screen"].facts["stopped"]) == (_DOCUMENTS, 0)
    for step, table in (("embed", "embeddings"), ("score", "scores"), ("curate", "curated")):
        assert read(found, step, table).equals(read(plain, step, table)), table


def test_what_is_like_the_seeds_passes(plain: dict[str, Manifest], screened: dict[str, Manifest]) -> None:
    table = read(screened, "screen", "screened")
    passed = table.filter(pl.col("margin") >= 0)
    assert 48 <= passed.height < 140, "a quarter is mathematics"
    embedded = read(screened, "embed", "embeddings")
    place = ["file", "row_group", "row"]
    assert embedded.select(place).rows() == passed.select(place).rows()
    best = set(read(plain, "curate", "curated")["doc_id"])
    assert len(best & set(read(screened, "curate", "curated")["doc_id"])) >= len(best) - 4
    assert set(read(screened, "curate", "curated")["source"]) == {"maths"}


def test_rows_add_up_over_the_steps(screened: dict[str, Manifest]) -> None:
    step, facts = screened["screen"], screened["screen"].facts
    assert (step.rows_in, step.rows_out, step.rejects) == (_DOCUMENTS, _DOCUMENTS, 0)
    assert screened["embed"].rows_in == facts["passed"] == _DOCUMENTS - facts["stopped"]
    assert facts["share"] == facts["passed"] / _DOCUMENTS
    assert step.tables["sampled"].rows == facts["sampled"] == 120
    assert 0 < step.tables["audited"].rows == facts["audited"] <= min(60, facts["stopped"])
    audited, sampled, embedded = (
        set(read(screened, name, table)["doc_id"])
        for name, table in (("screen", "audited"), ("screen", "sampled"), ("embed", "embeddings"))
    )
    assert not audited & (sampled | embedded)


def test_the_recall_is_measured_on_what_was_stopped(root: Path, screened: dict[str, Manifest]) -> None:
    (measured,) = screened["score"].facts["screen"][-1:]
    assert measured["documents"] <= screened["embed"].rows_out
    assert 0 <= measured["at_least"] <= measured["recall"] <= measured["at_most"] <= 1
    (domain,) = screened["screen"].facts["domains"]
    assert domain["best"] == 24
    assert domain["recall"] >= 0.9
    assert finescope("report", str(root / "runs" / "screened")).code == 0
    page = (root / "runs" / "screened" / "report" / "report.html").read_text()
    assert f"that passed the screen. Of all documents that score as high as its best {measured['documents']}," in page


def test_an_audit_of_all_is_a_count(root: Path, plain: dict[str, Manifest]) -> None:
    heard = Heard()
    found = run(
        root, "small", {"sample": 150, "audit": 1000, "share": 0.1, "recall": 0.99, "top": 0.25}, heard, curate=_TWENTIETH
    )
    facts = found["screen"].facts
    assert found["curate"].rows_out == _DOCUMENTS // 20, "a share of the corpus, not of what passed"
    card = (Path(found["curate"].uri) / "README.md").read_text()
    assert f"let through {facts['passed']} of {_DOCUMENTS} documents" in card
    assert facts["audited"] == facts["stopped"]
    everything = read(plain, "score", "scores").select("doc_id", "score")
    kept = everything.join(read(found, "embed", "embeddings").select("doc_id"), on="doc_id", how="semi")
    measured = found["score"].facts["screen"][-1]
    assert measured["at_least"] == measured["recall"] == measured["at_most"]
    # The scores of the one run are weighed with all documents, those of the other with its sample: nearly the same.
    lowest = kept["score"].sort(descending=True)[measured["documents"] - 1]
    expected = measured["documents"] / everything.filter(pl.col("score") >= lowest).height
    assert measured["recall"] == pytest.approx(expected, abs=0.1)
    assert [message for message in heard.warnings if "fewer than screen.recall asks for" in message]


def test_several_domains_share_a_screen(root: Path, plain: dict[str, Manifest]) -> None:
    recipe = values(root, "two", _SCREEN) | {
        "seeds": {"maths": str(root / "seeds.jsonl"), "cooking": str(root / "general.jsonl")}
    }
    for step in ("index", "model", "sae"):
        shutil.copytree(root / "runs" / "plain" / step, root / "runs" / "two" / step)
    path = write_recipe(root / "two.yaml", recipe)
    done = finescope("run", path, "--until", "score")
    assert done.code == 0, done.err
    told = finescope("inspect", str(root / "runs" / "two"), "screened")
    assert "screen by domain" in told.out
    assert {"maths", "cooking"} <= set(told.out.split())
    scores = finescope("inspect", str(root / "runs" / "two"), "scores")
    assert "recall of the screen (cooking)" in scores.out
    order = [line.split()[0] for line in finescope("status", str(root / "runs" / "two")).out.splitlines()[2:] if line.strip()]
    assert order[:7] == ["index", "model", "sae", "screen", "embed", "score-cooking", "score-maths"]
    planned = finescope("plan", path).out.splitlines()
    assert [line.split()[0] for line in planned[1:6]] == ["index", "model", "sae", "screen", "embed"]


def test_a_run_that_ends_again_and_again_ends_alike(
    root: Path, screened: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, put = root / "runs" / "killed" / "screen", storage.put_json
    records = [
        step / place
        for place in ("sample/units/000001.json", "units/000000.json", "units/000003.json", "audit/units/000002.json")
    ]
    first: dict[str, int] = {}
    for record in [*records, step / "manifest.json"]:

        def killed(uri: str, value: Any, last: Path = record) -> None:
            if Path(uri) == last:
                raise Killed
            put(uri, value)

        monkeypatch.setattr(storage, "put_json", killed)
        with pytest.raises(Killed):
            run(root, "killed", _SCREEN)
        now = stamps(step)
        assert {name: now[name] for name in first} == first, "what was done is not done again"
        first = {name: when for name, when in now.items() if "units/" in name or name == "screen.safetensors"}
    monkeypatch.setattr(storage, "put_json", put)
    found = run(root, "killed", _SCREEN)
    assert leftovers(root / "runs" / "killed") == []
    for name, table in _TABLES:
        assert read(found, name, table).equals(read(screened, name, table)), table
