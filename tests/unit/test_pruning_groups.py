import numpy as np
import pytest
import torch
from pruning_models import DENSE, FAMILIES, FIXED_HEADS, MIXTURES, layout, tiny_model
from transformers import Phi3Config, Phi3ForCausalLM

from finescope.errors import ModelError, RecipeError
from finescope.models.cuts import Cut
from finescope.models.groups import kinds_of, settings_of
from finescope.pruning.groups import Place, add_sums, owners_of, take


def sizes(model):
    return {(groups.kind, groups.by_expert): groups for groups in layout(model).groups}


def test_counts_by_hand_qwen2_with_biases():
    groups = layout(tiny_model("qwen2"))
    heads, mlp = groups.groups
    assert (groups.num_layers, groups.heads, heads.number, mlp.number) == (3, (6, 3, 8), 3, 40)
    # 16 query, 8 key, 8 value rows of 48 with a bias each, 16 columns of 48; gate and up rows, down column.
    assert heads.params == 32 * 49 + 16 * 48
    assert mlp.params == 3 * 48


# What of a block is of no group: norms over d_model, norms over one head, biases of output maps, GPT's attention.
STAYS = {
    "qwen3": 2 * 48 + 2 * 8,
    "gemma2": 4 * 48,
    "gemma3_text": 4 * 48 + 2 * 8,
    "gpt2": 4 * 48 + 48 * 49 * 4 + 48,
    "gpt_neox": 4 * 48 + 48 * 49 * 4 + 48,
}


@pytest.mark.parametrize("family", DENSE)
def test_groups_and_what_stays_make_up_the_block(family):
    model = tiny_model(family)
    found = layout(model)
    assert sum(3 * groups.number * groups.params for groups in found.groups) + 3 * STAYS.get(family, 96) == found.block_params
    assert found.model_params == model.num_parameters()


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_hold_their_channels(family):
    found = sizes(tiny_model(family))
    channels, experts = found["mlp", True], found["experts", False]
    assert (channels.rows, channels.number) == (4, 40 if family == "mixtral" else 20)
    assert channels.params == 3 * 48
    assert channels.allowed == ((8, 16, 24, 32, 40) if family == "mixtral" else (8, 16, 20))
    assert (experts.number, experts.params) == (4, channels.number * channels.params + 48)  # a row of the router
    assert experts.allowed == (2, 3, 4)  # a token uses two
    assert channels.layers == experts.layers == ((0, 1, 2) if family == "mixtral" else (0, 1))
    if family == "qwen3_moe":
        assert (found["mlp", False].layers, found["mlp", False].number) == ((2,), 40)
    assert found["heads", False].layers == (0, 1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_the_whole_model_are_its_own(family):
    model = tiny_model(family)
    found = layout(model)
    for name, value in settings_of(found, [groups.number for groups in found.groups]).items():
        assert getattr(model.config, name, 8) == value  # Phi-3 has no head_dim


def test_multi_query_heads_share_key_and_value():
    for family in ("llama", "phi3"):
        model = tiny_model(family, num_key_value_heads=1)
        found = layout(model)
        heads = found.groups[0]
        # Eight rows and columns of 48 a query head; the key and value head is of no group.
        assert (heads.number, heads.params) == (6, 2 * 8 * 48)
        settings = settings_of(found, [5, 40])
        assert (settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"]) == (5, 1, 8)


def test_owners_of_fused_rows_by_hand():
    assert owners_of([(8, 2), (4, 2), (4, 2)]).tolist() == [0] * 4 + [1] * 4 + [0, 0, 1, 1] * 2
    assert owners_of([(4, 2), (2, 0)]).tolist() == [0, 0, 1, 1, -1, -1]


def summed(values, cut, parts, rows=1, count=2, stretch=slice(None)):
    sums = torch.zeros(rows, count, dtype=torch.float64)
    add_sums(sums, values, Place(cut, parts, 0, 0), stretch, 1)
    return sums.tolist()


def test_sums_and_what_is_taken_by_hand():
    values = torch.arange(12.0).reshape(4, 3)
    rows, columns = Cut("heads", "w", 0, ("query",)), Cut("mlp", "w", 1, ("channel",))
    assert summed(values, rows, ((4, 2),)) == [[15.0, 51.0]]
    assert summed(values, rows, ((2, 2), (2, 2))) == [[3.0 + 21.0, 12.0 + 30.0]]
    assert summed(values, rows, ((2, 2), (2, 0))) == [[3.0, 12.0]]
    assert summed(values, columns, ((3, 3),), count=3) == [[18.0, 22.0, 26.0]]
    assert summed(values[:, 0], rows, ((4, 2),)) == [[3.0, 15.0]]
    place = Place(rows, ((2, 2), (1, 0), (1, 0)), 0, 0)
    assert take(values[:, 0], place, np.array([[0]])).tolist() == [0.0, 6.0, 9.0]
    assert take(values, Place(columns, ((3, 3),), 0, 0), np.array([[0, 2]]))[1].tolist() == [3.0, 5.0]


def test_experts_have_groups_of_their_own():
    values = torch.arange(8.0).reshape(2, 2, 2)  # [experts, across, channels]
    cut, parts = Cut("mlp", "w", 2, ("channel",), by_expert=True), ((2, 2),)
    assert summed(values, cut, parts, rows=2) == [[2.0, 4.0], [10.0, 12.0]]
    assert summed(values[1:], cut, parts, rows=2, stretch=slice(1, 2)) == [[0.0, 0.0], [10.0, 12.0]]
    whole = Cut("experts", "w", 0, ("expert",))
    assert summed(values, whole, parts) == [[6.0, 22.0]]
    assert summed(values[1:], whole, parts, stretch=slice(1, 2)) == [[0.0, 22.0]]
    assert take(values, Place(cut, parts, 0, 0), np.array([[0], [1]])).tolist() == [[[0.0], [2.0]], [[5.0], [7.0]]]


def test_uneven_blocks_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj = torch.nn.Linear(48, 39, bias=False)
    with pytest.raises(ModelError, match=r"layers\.1' has other shapes"):
        layout(model)


def test_quantised_weights_are_refused():
    model = tiny_model("llama")
    weight = model.model.layers[1].mlp.gate_proj.weight
    model.model.layers[1].mlp.gate_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate_proj\.weight' is quantised"):
        layout(model)


def test_only_numbers_of_heads_that_a_class_accepts_are_allowed():
    # Eight groups of three query heads in d_model 48.
    sizes = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 4}
    dividing = (1, 2, 4, 8)  # 3, 6, 12 and 24 query heads
    for family, allowed in {"gemma2": dividing, "gemma3_text": dividing, "olmo2": tuple(range(1, 9))}.items():
        assert layout(tiny_model(family, **sizes)).groups[0].allowed == allowed
    assert layout(tiny_model("llama", **sizes)).groups[0].allowed == tuple(range(1, 9))  # as a Mistral where they do not divide
    assert layout(tiny_model("llama", attention_bias=True, **sizes)).groups[0].allowed == dividing


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_that_a_model_has(family):
    found = layout(tiny_model(family))
    expected = ("mlp",) if family in FIXED_HEADS else ("heads", "mlp", "experts") if family in MIXTURES else ("heads", "mlp")
    assert kinds_of(found, "auto") == expected
    assert kinds_of(found, ("mlp",)) == ("mlp",)
    for kind in {"heads", "experts"} - set(expected):
        why = "no experts" if kind == "experts" else "for the(ir)? size"
        with pytest.raises(
            RecipeError, match=rf"no {kind} can be removed .*{why}.*; expected auto or a list of {', '.join(expected)}"
        ):
            kinds_of(found, (kind,))


def test_longrope_fixes_the_heads_of_phi3():
    # Its factors must be half as many as d_model / heads, whatever the size of a head is.
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope |= {"original_max_position_embeddings": 32, "partial_rotary_factor": 1.0}
    config = Phi3Config(**tiny_model("phi3").config.to_dict() | {"rope_parameters": rope})
    found = layout(Phi3ForCausalLM(config))
    assert kinds_of(found, "auto") == ("mlp",)
    with pytest.raises(RecipeError, match="Phi3Config accepts no other number of heads of 8"):
        kinds_of(found, ("heads",))
