"""What `prune` reads to compare the domain with general text, and what `evaluate` says of the student, in a finished run."""

import numpy as np
import polars as pl
import torch
from cli_runs import Finished, SilentReporter
from tiny_run import COMMON, COOKING, MATHS

from finescope.analysis.frames import frame_of
from finescope.analysis.pruning import agreement
from finescope.models.anatomy import anatomy_of
from finescope.models.blocks import BlocksInMemory
from finescope.models.load import load_model
from finescope.pruning.general import Head
from finescope.pruning.head_latents import head_activations
from finescope.runners.base import Context
from finescope.runners.local import LocalRunner
from finescope.stages.calibration import calibration_documents, general_documents
from finescope.stages.head_latents import activations_of, stored_codes
from finescope.stages.references import model_of
from finescope.steps import StepInput

CONTEXT = Context(LocalRunner(), SilentReporter())


def _step(finished: Finished) -> StepInput:
    return StepInput("memory://nowhere", "", finished.manifests)


def test_general_documents_are_others_than_those_for_calibration(finished: Finished) -> None:
    section, corpus = finished.recipe.prune, finished.recipe.corpus
    calibration = calibration_documents(CONTEXT, corpus, section, _step(finished))
    general = general_documents(CONTEXT, corpus, section, _step(finished), calibration.ids)
    assert (len(calibration.ids), len(general.ids)) == (16, 64)
    assert not set(calibration.ids) & set(general.ids)
    assert general.num_tokens == sum(len(tokens) for tokens in general.tokens)
    # Drawn from all of the corpus, three quarters of which are not of the domain: 26 or more unless by 1 in 10^6.
    sources = pl.read_parquet(finished.root / "corpus" / "*.parquet").filter(pl.col("id").is_in(general.ids))["source"]
    assert (sources == "cooking").sum() > 26
    for off in (section.model_copy(update={"general_documents": 0}), section.model_copy(update={"method": "magnitude"})):
        assert general_documents(CONTEXT, corpus, off, _step(finished), calibration.ids).ids == ()


def test_random_calibration_is_compared_with_other_random_documents(finished: Finished) -> None:
    section = finished.recipe.prune.model_copy(update={"calibration": "random"})
    calibration = calibration_documents(CONTEXT, finished.recipe.corpus, section, _step(finished))
    general = general_documents(CONTEXT, finished.recipe.corpus, section, _step(finished), calibration.ids)
    assert (len(calibration.ids), len(general.ids)) == (16, 64)
    assert not set(calibration.ids) & set(general.ids)


def test_the_facts_are_of_the_table(finished: Finished) -> None:
    prune = finished.manifests["prune"]
    importance = frame_of(prune, "importance")
    assert importance.collect()["general"].null_count() == 0
    found = agreement(importance)["correlation"].drop_nulls()
    assert len(found) == 6
    assert prune.facts["general_correlation_mean"] == found.mean()
    assert prune.facts["general_correlation_lowest"] == found.min()
    assert prune.facts["general_documents"] == 64


def test_codes_and_activations_are_in_the_order_of_the_documents(finished: Finished) -> None:
    step = _step(finished)
    documents = calibration_documents(CONTEXT, finished.recipe.corpus, finished.recipe.prune, step)
    embedded = {row["doc_id"]: row for row in frame_of(step["embed"], "embeddings").collect().to_dicts()}
    for row, doc_id in zip(stored_codes(CONTEXT, documents.ids, step).to_pylist(), documents.ids, strict=True):
        assert row == {name: embedded[doc_id][name] for name in ("doc_id", "latent_ids", "latent_values")}
    # One document alone is what it is among the others, which were batched by length.
    reference, heads = model_of(step["model"]), (Head(1, 1), Head(3, 0))
    found = activations_of(reference, heads, documents.tokens, lambda _: None)
    model = load_model(reference)
    for tokens, active in zip(documents.tokens, found, strict=True):
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(model.device)
        alone = head_activations(BlocksInMemory(model, anatomy_of(model)), heads, [(ids, torch.ones_like(ids))], lambda _: None)
        np.testing.assert_allclose(active, alone[0], rtol=1e-4)


def test_behind_a_screen_codes_are_in_its_sample_too(finished: Finished) -> None:
    embed = finished.manifests["embed"]
    all_of_them = embed.tables["embeddings"]
    passed = all_of_them.model_copy(update={"files": all_of_them.files[:3]})
    inputs = finished.manifests | {
        "embed": embed.model_copy(update={"tables": {"embeddings": passed}}),
        "screen": embed.model_copy(update={"tables": {"sampled": all_of_them}}),
    }
    doc_ids = tuple(frame_of(embed, "embeddings").select("doc_id").collect()["doc_id"].to_list()[::-7])
    found = stored_codes(CONTEXT, doc_ids, StepInput("memory://nowhere", "", inputs))
    assert found.equals(stored_codes(CONTEXT, doc_ids, _step(finished)))


def test_heads_of_the_domain_and_their_latents(finished: Finished) -> None:
    found = frame_of(finished.manifests["prune"], "head_latents").collect()
    assert found.height > 0
    assert found.select("layer", "group_index").unique().height <= 3
    assert found["documents"].is_between(5, 80).all()
    assert found["correlation"].is_between(-1, 1).all()


def test_students_of_one_size_share_what_was_measured_in_turns(finished: Finished) -> None:
    facts = finished.manifests["evaluate"].facts
    base, *students = (facts["models"][name] for name in ("base", "pruned", "recovered", "control"))
    shared = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes", "flops_per_token")
    assert all(student[name] == students[0][name] for student in students for name in shared)
    assert facts["speed"]["prompt_tokens"] == 512 - 16
    assert students[0]["flops_per_token"] < base["flops_per_token"]
    assert students[0]["peak_memory_bytes"] < base["peak_memory_bytes"]
    assert base["prefill_gain_over_flops"] is None
    # d_model 32, three blocks of 4 query and 2 key/value heads of 8 and 64 channels.
    blocks = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
    words = 5 + len(COMMON) + len(MATHS) + len(COOKING)
    assert base["flops_per_token"] == 2 * (blocks + 32 * words)
    names = set(frame_of(finished.manifests["evaluate"], "metrics").collect()["name"])
    assert {"pruned.prefill_gain_over_flops", "base.flops_per_token"} <= names
    assert "base.prefill_gain_over_flops" not in names
