import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pruning_models import batches_of, in_memory, layout, no_progress, prune, tiny_model

from finescope.config import PruneSection
from finescope.pruning.general import Head, heads_of_domain, with_general
from finescope.pruning.hidden import hidden_states
from finescope.pruning.taylor import taylor_importance
from finescope.schemas import IMPORTANCE, conform

BATCHES, GENERAL = batches_of(((9, 6, 4), (7, 7))), batches_of(((8, 8), (5,)), seed=1)
SECTION = PruneSection(ratio=0.25, round_to=4, compensate=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_general_stands_beside_the_same_groups(family):
    model, seen = tiny_model(family), []
    result = prune(model, SECTION, BATCHES, no_progress)
    found = with_general(result.importance, in_memory(model), SECTION, GENERAL, None, seen.append)
    assert found.schema == IMPORTANCE
    assert found.drop_columns("general").equals(result.importance.drop_columns("general"))
    assert sum(seen) == 21
    with hidden_states(None) as boundaries:
        expected = taylor_importance(in_memory(model), layout(model), 1, GENERAL, boundaries, no_progress)
    rows = pl.from_arrow(found)
    for groups, values in zip(layout(model).groups, expected.values, strict=True):
        for layer, of_layer in zip(groups.layers, values, strict=True):
            of_kind = rows.filter(layer=layer + 1, kind=groups.kind).sort("group_index")
            np.testing.assert_array_equal(of_kind["general"], of_layer.reshape(-1))


def test_on_the_same_documents_it_is_the_same():
    model = tiny_model("llama")
    table = prune(model, SECTION, BATCHES, no_progress).importance
    found = with_general(table, in_memory(model), SECTION, BATCHES, None, no_progress)
    assert found["general"].equals(found["importance"])


def heads(*rows):
    """layer, group_index, importance, general of heads, and an MLP channel that must not be taken for one."""
    frame = pl.DataFrame([*rows, (1, 9, 1.0, 0.0)], schema=["layer", "group_index", "importance", "general"], orient="row")
    kind = pl.Series(["heads"] * len(rows) + ["mlp"])
    return conform(frame.with_columns(kind=kind, num_params=1, kept=True).to_arrow(), IMPORTANCE)


def test_heads_are_compared_by_their_share_of_the_layer():
    # Shares in layer 1: .75 and .25 against .5 and .5; in layer 2, a hundred times as important on general text, .5 .3 .2
    # against .1 .3 .6.
    table = heads((1, 0, 3.0, 4.0), (1, 1, 1.0, 4.0), (2, 0, 5.0, 100.0), (2, 1, 3.0, 300.0), (2, 2, 2.0, 600.0))
    assert heads_of_domain(table, 8) == [Head(2, 0), Head(1, 0)]
    assert heads_of_domain(table, 1) == [Head(2, 0)]


def test_without_general_importance_no_head_differs():
    table = heads((1, 0, 3.0, 4.0), (1, 1, 1.0, 4.0))
    assert heads_of_domain(table.set_column(6, "general", pa.nulls(3, pa.float32())), 8) == []
    # A head that is of no importance anywhere is no share of nothing.
    assert heads_of_domain(heads((1, 0, 0.0, 0.0)), 8) == []
