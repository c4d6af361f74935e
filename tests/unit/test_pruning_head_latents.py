import numpy as np
import pyarrow as pa
import pytest
import torch
from pruning_models import WITH_HEADS, batches_of, in_memory, tiny_model

from finescope.models.anatomy import anatomy_of, blocks_of
from finescope.pruning.general import Head
from finescope.pruning.head_latents import head_activations, latent_correlations
from finescope.schemas import HEAD_LATENTS

BATCHES = batches_of(((9, 6, 2), (7, 7)))
HEADS = [Head(2, 2), Head(1, 0), Head(2, 0)]


@pytest.mark.parametrize("family", WITH_HEADS)
def test_activations_are_those_of_the_whole_model(family):
    model, seen = tiny_model(family), []
    anatomy = anatomy_of(model)
    found = head_activations(in_memory(model), HEADS, BATCHES, seen.append)
    assert sum(seen) == 31
    expected = []
    for ids, mask in BATCHES:
        inputs = {}
        handles = [
            block.get_submodule(anatomy.output).register_forward_pre_hook(
                lambda _, arguments, layer=layer, inputs=inputs: inputs.update({layer: arguments[0]})
            )
            for layer, block in enumerate(blocks_of(model, anatomy), start=1)
        ]
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        for handle in handles:
            handle.remove()
        for document, length in enumerate(mask.sum(dim=1).tolist()):
            # Two query heads of eight dimensions each.
            parts = [inputs[head.layer][document, 1:length, 16 * head.group : 16 * (head.group + 1)] for head in HEADS]
            expected.append([part.square().mean().sqrt().item() for part in parts])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def codes(matrix):
    """The table of codes of a dense matrix [documents, latents]; zeros are left out."""
    ids = [np.flatnonzero(row).tolist() for row in matrix]
    values = [row[row > 0].astype(np.float16).tolist() for row in matrix]
    return pa.table(
        {"latent_ids": pa.array(ids, pa.list_(pa.int32())), "latent_values": pa.array(values, pa.list_(pa.float16()))}
    )


def test_correlations_are_pearsons_with_zeros_where_a_latent_is_absent():
    random = np.random.default_rng(0)
    # Values that halves hold exactly; latent 3 is rare, latent 4 the same everywhere, and latent 5 nowhere.
    matrix = random.integers(1, 9, (30, 6)) * (random.random((30, 6)) < 0.5) / 4.0
    matrix[:, 3], matrix[:, 4], matrix[:, 5] = np.eye(30)[:, :4].sum(axis=1), 0.3, 0.0
    activations, in_domain = random.random((30, 2)).astype(np.float32), np.arange(30) < 12
    found = latent_correlations([Head(4, 1), Head(2, 0)], activations, codes(matrix), in_domain, least=5)
    assert found.schema == HEAD_LATENTS
    rows = found.to_pylist()
    assert [(row["layer"], row["group_index"]) for row in rows] == [(4, 1)] * 3 + [(2, 0)] * 3
    for number, start in ((0, 0), (1, 3)):
        of_head = rows[start : start + 3]
        assert {row["latent"] for row in of_head} == {0, 1, 2}
        correlations = [row["correlation"] for row in of_head]
        assert correlations == sorted(correlations, reverse=True)
        for row in of_head:
            latent = matrix[:, row["latent"]]
            assert row["correlation"] == pytest.approx(np.corrcoef(activations[:, number], latent)[0, 1], abs=1e-6)
            assert row["documents"] == np.count_nonzero(latent)
            assert row["domain_mean"] == pytest.approx(latent[:12].mean())
            assert row["general_mean"] == pytest.approx(latent[12:].mean())


def test_a_latent_that_is_the_head_is_first():
    activations = np.random.default_rng(1).random((20, 1)).astype(np.float16)
    matrix = np.column_stack([np.ones(20) - activations[:, 0], activations[:, 0]]).astype(np.float64)
    found = latent_correlations([Head(1, 0)], activations.astype(np.float32), codes(matrix), np.ones(20, bool), least=5)
    assert found["latent"].to_pylist() == [1, 0]
    np.testing.assert_allclose(found["correlation"], [1.0, -1.0], atol=1e-3)
    # Without a general document its mean is zero.
    assert found["general_mean"].to_pylist() == [0.0, 0.0]
