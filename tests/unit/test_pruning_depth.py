import copy

import pytest
import torch
from pruning_models import FAMILIES, batches_of, in_memory, layout, no_progress, prune, shallow, tiny_model
from tiny_models import reference, tiny_config

from finescope.config import PruneSection
from finescope.errors import RecipeError, StepFailed
from finescope.models.anatomy import anatomy_of, block_parameters, blocks_of
from finescope.models.blocks import open_blocks, without_blocks
from finescope.models.depth import check_blocks_may_leave, with_blocks
from finescope.pruning import depth
from finescope.pruning.depth import choose_blocks
from finescope.pruning.prune import planned_tokens
from finescope.pruning.verify import verify_saved
from finescope.schemas import IMPORTANCE

BATCHES = batches_of(((9, 6, 4), (7, 7), (12,)))


def skipping(model, gone):
    """The model whose blocks `gone` return what they are given: what one without these blocks must compute."""
    model = copy.deepcopy(model)
    for layer in gone:
        blocks_of(model, anatomy_of(model))[layer].forward = lambda hidden, *_, **__: hidden
    return model


def logits(model, ids, mask, **arguments):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **arguments).logits


def loss(model):
    """Mean of -log p over the predicted tokens of the batches, by whole forward passes."""
    rows = []
    for ids, mask in BATCHES:
        log_p = logits(model, ids, mask)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        rows.append(-log_p[mask[:, 1:].bool()])
    return torch.cat(rows).mean().item()


def greedy(model, number):
    """The blocks that leave and the losses after each, by trying all of them every time."""
    gone, losses = [], [loss(model)]
    for _ in range(number):
        left = [layer for layer in range(len(blocks_of(model, anatomy_of(model)))) if layer not in gone]
        tried = {layer: loss(skipping(model, [*gone, layer])) for layer in left}
        gone.append(min(tried, key=tried.__getitem__))
        losses.append(min(tried.values()))
    return sorted(gone), losses


def chosen(model, ratio, *, filled=False, batches=BATCHES):
    return choose_blocks(in_memory(model), batches, ratio, filled, no_progress)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_that_leave_are_those_of_trying_all(family):
    model = tiny_model(family)
    # Of Qwen3-MoE the last block is dense and so of another size.
    ratio = 0.6 * 3 * max(sizes_of(model)) / sum(sizes_of(model))
    found = chosen(model, ratio)
    gone, losses = greedy(model, 2)
    assert found.num_tokens == sum(int(mask[:, 1:].sum()) for _, mask in BATCHES)
    assert found.tried[0] == pytest.approx({layer: loss(skipping(model, [layer])) for layer in range(3)}, abs=2e-5)
    if family != "qwen3_moe":
        assert list(found.removed) == gone
        assert found.losses == pytest.approx((losses[0], losses[2]), abs=2e-5)


def sizes_of(model):
    return [sum(parameter.numel() for parameter in block.parameters()) for block in blocks_of(model, anatomy_of(model))]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_influence_is_one_minus_the_cosine_over_the_block(family):
    model = tiny_model(family)
    states = [
        [state[mask.bool()] for state in model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states]
        for ids, mask in BATCHES
    ]
    before_and_after = [torch.cat(parts) for parts in zip(*states, strict=True)]
    # The last of the hidden states has gone through the final norm.
    expected = [
        1 - torch.nn.functional.cosine_similarity(before_and_after[layer], before_and_after[layer + 1]).mean().item()
        for layer in range(2)
    ]
    assert chosen(model, 0.0).influences[:2] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "filled", "number"),
    [
        (0.0, False, 0),
        (0.3, False, 1),
        (0.4, False, 1),
        (0.55, False, 2),
        (0.3, True, 0),
        (0.34, True, 1),
        (0.6, True, 1),
        (0.9, True, 2),
    ],
)
def test_how_many_of_three_leave(ratio, filled, number):
    told = []
    model = tiny_model("llama")
    found = choose_blocks(in_memory(model), BATCHES, ratio, filled, told.append)
    assert len(found.removed) == number
    assert sum(told) == sum(int(mask.sum()) for _, mask in BATCHES)
    assert len(found.tried) == number


def test_a_ratio_of_whole_blocks_is_not_missed_by_rounding():
    # 3 * 0.333... of the parameters is less than a block by some bits.
    assert len(chosen(tiny_model("llama"), 1 - 2 / 3, filled=True).removed) == 1


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.1, "no block: expected 0 or at least 0.1667"), (0.9, "every one of the 3 blocks")]
)
def test_a_ratio_that_whole_blocks_alone_cannot_have(ratio, said):
    with pytest.raises(RecipeError, match=f"prune.ratio {ratio} .*{said}"):
        chosen(tiny_model("llama"), ratio)


def test_blocks_of_least_influence_are_tried_and_leave_untried_where_each_turn_may_try_one(monkeypatch):
    model = tiny_model("llama")
    least = sorted(range(3), key=chosen(model, 0.6).influences.__getitem__)
    monkeypatch.setattr(depth, "_TRIED", 4)
    assert [set(turn) <= set(least) and len(turn) for turn in chosen(model, 0.6).tried] == [2, 2]
    assert set(chosen(model, 0.6).tried[0]) == set(least[:2])
    monkeypatch.setattr(depth, "_TRIED", 3)
    untried = chosen(model, 0.6)
    assert (set(untried.removed), untried.tried) == (set(least[:2]), ({}, {}))
    assert untried.losses[1] == pytest.approx(loss(skipping(model, least[:2])), abs=2e-5)


@pytest.mark.parametrize(("ratio", "passes"), [(0.03, 8), (0.1, 10), (0.2, 13), (0.4, 2)])
def test_the_work_does_not_grow_with_the_depth(ratio, passes):
    assert depth.work(30, ratio).passes == passes


def test_blocks_are_chosen_as_well_from_disk(tmp_path):
    model = tiny_model("gemma3_text")
    model.save_pretrained(tmp_path)
    with open_blocks(reference(tmp_path), "cpu") as source:
        found = choose_blocks(source, BATCHES, 0.4, False, no_progress)
        with without_blocks(source, found.kept).block(1) as block:
            expected = blocks_of(model, source.anatomy)[found.kept[1]]
            assert all(torch.equal(value, expected.get_parameter(name)) for name, value in block.named_parameters())
    assert found.kept == chosen(model, 0.4).kept


def test_losses_are_measured_on_some_documents_evenly_spaced(monkeypatch):
    monkeypatch.setattr(depth, "DOCUMENTS", 3)
    # Six documents: the first, third and fifth.
    expected = sum(length - 1 for length in (9, 4, 7))
    assert chosen(tiny_model("llama"), 0.0).num_tokens == expected


def test_no_document_of_two_tokens_is_a_failed_step():
    with pytest.raises(StepFailed, match="no calibration document has two tokens"):
        chosen(tiny_model("llama"), 0.3, batches=batches_of(((1, 1),)))


@pytest.mark.parametrize("kept", [(0, 2), (1, 2), (0, 1), (1,), (2,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_blocks_computes_what_one_that_skips_them_does(family, kept, tmp_path):
    model = tiny_model(family)
    anatomy, before = anatomy_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    shallower = shallow(model, kept)
    skipped = skipping(model, [layer for layer in range(3) if layer not in kept])
    (ids, mask), *_ = BATCHES
    torch.testing.assert_close(logits(shallower, ids, mask), logits(skipped, ids, mask), rtol=1e-4, atol=1e-5)
    assert type(shallower) is type(model)
    assert shallower.config.num_hidden_layers == len(blocks_of(shallower, anatomy)) == len(kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        cache = shallower(input_ids=ids[:1, :5], use_cache=True).past_key_values
        stepped = shallower(input_ids=ids[:1, 5:6], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(stepped[0, 0], logits(skipped, ids, mask)[0, 5], rtol=1e-4, atol=1e-5)
    shallower.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path), ids, mask), logits(shallower, ids, mask))


def test_which_blocks_are_dense_is_kept_by_a_list():
    # Of four blocks the even ones are mixtures by the step, and the fourth is dense by the list.
    config = tiny_config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    cut_config = with_blocks(config, (0, 1, 3))
    assert (cut_config.mlp_only_layers, cut_config.decoder_sparse_step) == ([0, 2], 1)
    model = tiny_model("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[])
    shallower = shallow(model, (1, 2))
    (ids, mask), *_ = BATCHES
    torch.testing.assert_close(logits(shallower, ids, mask), logits(skipping(model, [0]), ids, mask), rtol=1e-4, atol=1e-5)


def test_layer_types_go_with_their_blocks():
    config = tiny_config("gemma3_text")
    assert with_blocks(config, (1, 2)).layer_types == config.layer_types[1:3]
    assert len(set(config.layer_types[1:3])) == 2


def test_attention_that_is_scaled_by_its_block_s_number_is_refused():
    check_blocks_may_leave(tiny_config("gpt2"))
    with pytest.raises(RecipeError, match=r"prune\.structure: no blocks .*scale_attn_by_inverse_layer_idx"):
        check_blocks_may_leave(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(RecipeError, match="it has one"):
        check_blocks_may_leave(tiny_config("llama", num_layers=1))


def pruned(model, told=no_progress, **changes):
    section = PruneSection(**({"ratio": 0.4, "round_to": 4, "structure": ("blocks",)} | changes))
    return section, prune(model, section, BATCHES, told)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loses_blocks_alone(family):
    model, told = tiny_model(family), []
    section, (student, table, summary, _) = pruned(model, told.append)
    assert sum(told) == planned_tokens(section, 45) == 2 * 45
    gone = summary["blocks"]["removed"]
    assert len(gone) == summary["blocks_before"] - summary["blocks_after"] == 1
    assert table.schema == IMPORTANCE
    rows = table.to_pylist()
    assert [(row["layer"], row["kind"], row["kept"]) for row in rows] == [(n, "blocks", n not in gone) for n in (1, 2, 3)]
    assert [row["importance"] for row in rows] == pytest.approx(summary["blocks"]["influences"], rel=1e-6)
    assert [row["num_params"] for row in rows] == sizes_of(model)
    assert block_parameters(student, anatomy_of(student)) == sum(row["num_params"] for row in rows if row["kept"])
    assert summary["ratio_reached"] == pytest.approx(1 - summary["block_parameters_after"] / sum(sizes_of(model)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe"])
def test_channels_fill_what_whole_blocks_leave_of_the_ratio(family):
    model, told = tiny_model(family), []
    section, (student, table, summary, _) = pruned(model, told.append, ratio=0.5, structure=("blocks", "mlp"))
    assert sum(told) == planned_tokens(section, 45) == 3 * 45
    (gone,) = summary["blocks"]["removed"]
    assert summary["ratio_reached"] == pytest.approx(0.5, abs=0.05)
    rows = table.to_pylist()
    assert {(row["layer"], row["kind"]) for row in rows} == {(n, "blocks") for n in (1, 2, 3)} | {
        (n, kind) for n in (1, 2, 3) if n != gone for kind in ("heads", "mlp", "experts") if (n, kind) in present(model)
    }
    assert [row["layer"] for row in rows] == sorted(row["layer"] for row in rows)
    assert student.config.num_hidden_layers == 2


def present(model):
    return {(layer + 1, groups.kind) for groups in layout(model).groups for layer in groups.layers}


def test_a_rest_that_rounds_to_nothing_is_left_out():
    model = tiny_model("llama")
    _, (student, _, summary, _) = pruned(model, ratio=0.335, structure=("blocks", "mlp"), round_to=32)
    assert summary["ratio_reached"] == pytest.approx(1 / 3)
    assert student.config.intermediate_size == 40


def test_heads_of_a_shallower_model_leave_too(tmp_path):
    # Fifteen heads do not divide d_model, so that a Llama of two blocks becomes a Mistral.
    model = tiny_model("llama", num_attention_heads=24, num_key_value_heads=8, head_dim=4)
    _, (student, _, summary, cases) = pruned(model, ratio=0.5, structure=("blocks", "heads"))
    student.save_pretrained(tmp_path)
    verified = verify_saved(tmp_path, torch.float32, torch.device("cpu"), cases)
    assert verified.architecture == summary["architecture"] == "MistralForCausalLM"
    assert (student.config.num_hidden_layers, verified.num_generated) == (2, 4)
