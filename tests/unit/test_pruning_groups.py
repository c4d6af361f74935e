import pytest
import torch
from pruning_models import FAMILIES, tiny_model

from finescope.errors import ModelError
from finescope.models.anatomy import anatomy_of
from finescope.pruning.groups import GroupSlice, group_indices, group_sums, groups_of


def test_counts_by_hand_qwen2_with_biases():
    model = tiny_model("qwen2")
    groups = groups_of(model, anatomy_of(model))
    assert (groups.num_layers, groups.num_kv_heads, groups.queries_per_kv, groups.num_channels) == (3, 3, 2, 40)
    # 16 query, 8 key, 8 value rows of 48 with a bias each, 16 columns of 48; gate and up rows, down column.
    assert groups.head_params == 32 * 49 + 16 * 48
    assert groups.channel_params == 3 * 48


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_and_what_stays_make_up_the_block(family):
    model = tiny_model(family)
    groups = groups_of(model, anatomy_of(model))
    stays = 2 * 48 + (2 * 8 if family == "qwen3" else 0)  # norms over d_model, q and k norms over head_dim
    assert groups.num_kv_heads * groups.head_params + groups.num_channels * groups.channel_params + stays == groups.block_params
    assert groups.model_params == model.num_parameters()


def test_multi_query_is_one_group():
    model = tiny_model("llama", num_key_value_heads=1)
    groups = groups_of(model, anatomy_of(model))
    assert (groups.num_kv_heads, groups.queries_per_kv) == (1, 6)


def test_sums_and_indices_by_hand():
    values = torch.arange(12.0).reshape(4, 3)
    assert group_sums(values, GroupSlice("q", "heads", 0, 2)).tolist() == [15.0, 51.0]
    assert group_sums(values, GroupSlice("d", "mlp", 1, 1)).tolist() == [18.0, 22.0, 26.0]
    assert group_sums(values[:, 0], GroupSlice("q", "heads", 0, 2)).tolist() == [3.0, 15.0]
    assert group_indices(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_uneven_blocks_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj = torch.nn.Linear(48, 39, bias=False)
    with pytest.raises(ModelError, match=r"layers\.1' has other shapes"):
        groups_of(model, anatomy_of(model))
