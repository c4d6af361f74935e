"""The step `teach` on a tiny model: what it writes, what does it again, and who teaches."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from cli_runs import Ended, Finished, finescope, stamps, write_recipe
from tiny_run import recipe_values, write_model

from finescope.analysis.frames import manifests_of
from finescope.manifest import Manifest


class Again:
    """A copy of the finished run, with other settings of `distill`."""

    def __init__(self, finished: Finished, home: Path) -> None:
        self.output = home / "run"
        shutil.copytree(finished.output, self.output)
        values = recipe_values(finished.root, "again") | {"output": str(self.output)}
        self._recipe = write_recipe(home / "recipe.yaml", values)

    def left(self, **distill: Any) -> list[str]:
        """The steps that are not done with these settings."""
        planned = finescope("plan", self._recipe, "--json", *_settings(distill))
        return [cost["step"] for cost in json.loads(planned.out) if not cost["done"]]

    def run(self, **distill: Any) -> Ended:
        return finescope("run", self._recipe, "--until", "teach", *_settings(distill))

    def teach(self, **distill: Any) -> Manifest:
        ended = self.run(**distill)
        assert ended.code == 0, ended.err
        return manifests_of(str(self.output))["teach"]


def _settings(distill: dict[str, Any]) -> list[str]:
    return [part for key, value in distill.items() for part in ("--set", f"distill.{key}={value}")]


@pytest.fixture
def again(finished: Finished, tmp_path: Path) -> Again:
    return Again(finished, tmp_path)


def rows(manifest: Manifest, table: str) -> pl.DataFrame:
    return pl.read_parquet(manifest.files(table))


def test_what_is_done_again_when_a_setting_changes(again: Again) -> None:
    after = ["distill", "evaluate", "report"]
    assert again.left() == []
    for training in ({"learning_rate": 5e-4}, {"method": "full"}, {"epochs": 1}, {"kl_divergence": "reverse"}):
        assert again.left(**training) == after, training
    for teaching in ({"rewrite_tokens": 20}, {"rewrite_temperature": 0.5}, {"max_tokens": 24}, {"kl_weight": 0.5}):
        assert again.left(**teaching) == ["teach", *after], teaching
    with_logits = again.teach(kl_weight=0.5)
    assert again.left(kl_weight=0.25) == after, "the weight is the training's"
    assert with_logits.uri != str(again.output / "teach"), "what was written without is still there"
    assert again.left() == []


def test_log_probabilities_of_everything_that_is_trained_on(again: Again, finished: Finished) -> None:
    taught = again.teach(kl_weight=0.5, kl_top_k=3)
    assert list(taught.tables) == ["rewrites", "control_rewrites", "teacher_logprobs", "control_teacher_logprobs"]
    for written, scored in (("rewrites", "teacher_logprobs"), ("control_rewrites", "control_teacher_logprobs")):
        # The text is what it is without them.
        assert rows(taught, written).equals(rows(finished.manifests["teach"], written))
        table = rows(taught, scored)
        assert table["doc_id"].equals(rows(taught, written)["doc_id"])
        assert table["ids"].list.len().equals((3 * table["targets"]).cast(pl.UInt32).rename("ids"))
        assert table["logprobs"].list.len().equals((4 * table["targets"]).cast(pl.UInt32).rename("logprobs"))
        assert [Path(one).name for one in taught.files(scored)] == [Path(one).name for one in taught.files(written)]
    assert taught.facts["targets"] == rows(taught, "teacher_logprobs")["targets"].sum() > 0
    mass = rows(taught, "teacher_logprobs")["logprobs"].explode().cast(pl.Float64).exp().to_numpy().reshape(-1, 4).sum(1)
    assert mass == pytest.approx(1.0, abs=0.01), "with all other tokens together none is missing"
    head = json.loads(finescope("inspect", str(again.output), "teacher_logprobs", "--json").out)["head"]
    assert [row["targets"] for row in head] == rows(taught, "teacher_logprobs")["targets"].head(10).to_list()


def test_units_that_are_done_are_not_done_again(again: Again) -> None:
    uri = Path(again.teach(kl_weight=0.5).uri)
    before = stamps(uri)
    (uri / "manifest.json").unlink()
    lost = ("units/000001.json", "control_rewrites/part-000001.parquet", "logprobs/units/000000.json")
    for name in lost:
        (uri / name).unlink()
    again.teach(kl_weight=0.5)
    after = stamps(uri)
    changed = {name for name in after if after[name] != before[name]}
    assert after.keys() == before.keys()
    assert changed == {*lost, "manifest.json", "logprobs/teacher_logprobs/part-000000.parquet"}


def test_another_model_teaches(again: Again, finished: Finished, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    taught = again.teach(teacher=other, kl_weight=0.5)
    assert taught.facts["teacher"]["source"] == taught.facts["teacher"]["path"] == str(other)
    assert taught.facts["teacher"]["fingerprint"] != finished.manifests["model"].facts["reference"]["fingerprint"]
    own = again.teach(kl_weight=0.5)
    assert own.facts["teacher"]["source"] == finished.manifests["model"].facts["source"]
    theirs, ours = (rows(manifest, "control_teacher_logprobs")["ids"].to_list() for manifest in (taught, own))
    assert theirs != ours


def test_a_teacher_that_changes_meanwhile_is_refused(again: Again, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    uri = Path(again.teach(teacher=other).uri)
    (uri / "manifest.json").unlink()
    again.teach(teacher=other)
    (uri / "manifest.json").unlink()
    write_model(other, seed=2)
    ended = again.run(teacher=other)
    assert ended.code == 2
    assert f"distill.teacher '{other}' has changed since it began to teach; remove '{uri}'" in ended.errors[0]
