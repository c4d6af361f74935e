import numpy as np
import pytest
import torch
from pruning_models import FAMILIES, MIXTURES, WITH_HEADS, batches_of, in_memory, layout, no_progress, tiny_model

from finescope.errors import StepFailed
from finescope.models.anatomy import anatomy_of, blocks_of, has_experts, linear_map
from finescope.pruning import taylor as module
from finescope.pruning.hidden import hidden_states
from finescope.pruning.importance import magnitude_importance, random_importance
from finescope.pruning.taylor import taylor_importance

BATCHES = batches_of(((9, 6, 2), (7, 1)))


def taylor(model, batches, progress, spill_to=None, order=1):
    """Taylor importance of a model in memory; hidden states too, but for a directory that is given."""
    with hidden_states(spill_to) as boundaries:
        return taylor_importance(in_memory(model), layout(model), order, batches, boundaries, progress)


def by_block(model, products):
    """Sums over each group of a block's parameters, by name, in plain slices: heads, channels (by expert), experts."""
    found = {"heads": [], "mlp": [], "experts": []}
    for block, values in zip(blocks_of(model, anatomy_of(model)), products, strict=True):
        found["heads"].append(naive_heads(values))
        experts = has_experts(block, anatomy_of(model))
        channels = naive_experts(values) if experts else naive_channels(values)[None]
        found["mlp"].append(channels)
        found["experts"].append(channels.sum(dim=1)[None] if experts else None)
    return found


def naive_heads(values):
    """Of three key/value heads of 8 with two query heads each."""
    sums = []
    for head in range(3):
        query, key = slice(16 * head, 16 * head + 16), slice(8 * head, 8 * head + 8)
        total = 0
        for name, value in values.items():
            if name.startswith(("self_attn.q_", "self_attn.k_", "self_attn.v_")) and len(value) > 8:  # not a norm over one head
                total += value[query if ".q_" in name else key].sum()
            elif name == "self_attn.o_proj.weight":
                total += value[:, query].sum()
            elif name == "self_attn.qkv_proj.weight":  # 48 query rows, 24 key rows, 24 value rows
                rows = [value[query], value[48:72][key], value[72:][key]]
                total += sum(part.sum() for part in rows)
        sums.append(torch.as_tensor(total))
    return torch.stack(sums)[None]


def naive_channels(values):
    total = 0
    for name, value in values.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight", "dense_h_to_4h.weight")) and "gate_up" not in name:
            total = total + value.sum(1)
        elif name.endswith(("down_proj.weight", "dense_4h_to_h.weight", "c_fc.weight")):
            total = total + value.sum(0)
        elif name.endswith(("gate_proj.bias", "up_proj.bias", "dense_h_to_4h.bias", "c_fc.bias")):
            total = total + value
        elif name == "mlp.c_proj.weight":
            total = total + value.sum(1)
        elif name.endswith("gate_up_proj.weight"):
            total = total + value[:40].sum(1) + value[40:].sum(1)
    return total


def naive_experts(values):
    gate_up, down = values["mlp.experts.gate_up_proj"], values["mlp.experts.down_proj"]
    channels = down.shape[2]
    return gate_up[:, :channels].sum(2) + gate_up[:, channels:].sum(2) + down.sum(1)


def naive_taylor(model, batches, order=1):
    """sum |w * g|, or (w * g)^2 * tokens / 2, of each group over all gradients at once, from the model's own loss."""
    sums, total = {}, 0
    for ids, mask in batches:
        labels = torch.where(mask.bool(), ids, -100)
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        tokens = int(mask[:, 1:].sum())
        blocks = blocks_of(model, anatomy_of(model))
        products = [{n: (p.detach() * p.grad).double() for n, p in b.named_parameters() if p.grad is not None} for b in blocks]
        terms = [{n: p.abs() if order == 1 else p**2 * tokens / 2 for n, p in block.items()} for block in products]
        found = by_block(model, terms)
        for kind, layers in found.items():
            before = sums.get(kind, [0] * len(layers))
            sums[kind] = [None if now is None else old + tokens * now for old, now in zip(before, layers, strict=True)]
        total += tokens
    return {kind: [None if layer is None else layer / total for layer in layers] for kind, layers in sums.items()}


def assert_equals(found, expected, groups_of_model, rtol):
    for groups, values in zip(groups_of_model.groups, found.values, strict=True):
        for layer, got in zip(groups.layers, values, strict=True):
            np.testing.assert_allclose(got, expected[groups.kind][layer], rtol=rtol, err_msg=f"{groups.kind} of block {layer}")


@pytest.mark.parametrize(
    ("family", "changes"), [*((name, {}) for name in FAMILIES), ("llama", {"attention_bias": True, "mlp_bias": True})]
)
def test_streamed_taylor_equals_naive(family, changes, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_ROWS", 5)
    model = tiny_model(family, **changes)
    expected = naive_taylor(model, BATCHES)
    model.zero_grad()
    seen = []
    found = taylor(model, BATCHES, seen.append)
    assert_equals(found, expected, layout(model), 2e-4)
    assert sum(seen) == 25
    assert bool(found.expert_tokens) == (family in MIXTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_order_equals_naive(family):
    model = tiny_model(family)
    expected = naive_taylor(model, BATCHES, order=2)
    model.zero_grad()
    assert_equals(taylor(model, BATCHES, no_progress, order=2), expected, layout(model), 5e-4)


def test_multi_query_heads_have_importance_of_their_own():
    model = tiny_model("llama", num_key_value_heads=1)
    found = taylor(model, BATCHES[:1], no_progress)
    ids, mask = BATCHES[0]
    model(input_ids=ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss.backward()
    query, output = (linear_map(blocks_of(model, anatomy_of(model))[1], f"self_attn.{name}_proj").weight for name in "qo")
    rows = (query * query.grad).abs().reshape(6, 8 * 48).sum(1) + (output * output.grad).abs().reshape(48, 6, 8).sum((0, 2))
    np.testing.assert_allclose(found.values[0][1][0], rows.detach(), rtol=2e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_without_tokens_has_importance_zero(family, monkeypatch):
    model = tiny_model(family, num_experts_per_tok=1)
    for layer in (0, 1):
        # Of two opposite rows one is above zero, where the others are.
        router = blocks_of(model, anatomy_of(model))[layer].get_parameter("mlp.gate.weight")
        router.data[:2], router.data[3] = 0, -router.data[2]
    # Kernels may leave anything as the gradient of an expert that had nothing to do.
    original = module._Sums.reduce

    def poisoned(self, parameter, places):
        if parameter.ndim == 3:
            idle = [expert for expert in range(4) if expert not in self._experts]
            parameter.grad[idle] = torch.nan
        original(self, parameter, places)

    monkeypatch.setattr(module._Sums, "reduce", poisoned)
    found = taylor(model, BATCHES, no_progress)
    tokens = np.stack([found.expert_tokens[layer] for layer in (0, 1)])
    assert tokens.sum(axis=1).tolist() == [25, 25]  # none for padding
    assert (tokens[:, :2] == 0).all()
    for groups, values in zip(layout(model).groups, found.values, strict=True):
        assert np.isfinite(values).all()
        if groups.kind == "experts":
            assert ((values[:2, 0] == 0) == (tokens == 0)).all()
        if groups.by_expert:
            assert ((values[:2] == 0).all(axis=-1) == (tokens == 0)).all()


def test_gradients_are_freed_one_by_one_and_the_model_is_left_as_it_was(monkeypatch):
    model = tiny_model("qwen2")
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    alive = []
    original = module.add_sums

    def counting(*arguments):
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        original(*arguments)

    monkeypatch.setattr(module, "add_sums", counting)
    taylor(model, BATCHES[:1], no_progress)
    assert max(alive) == 1
    assert len(alive) == 3 * 10  # three blocks of seven weights and three biases
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_in_a_file_are_the_same(dtype, tmp_path):
    model = tiny_model("llama", dtype=dtype)
    held, spilled = (taylor(model, BATCHES, no_progress, spill_to) for spill_to in (None, tmp_path))
    assert all(np.array_equal(one, other) for one, other in zip(held.values, spilled.values, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_padding_does_not_matter():
    for family in ("llama", "mixtral"):
        model = tiny_model(family)
        ids, mask = BATCHES[0]
        longer = torch.cat([ids, torch.full((3, 4), 11)], 1), torch.cat([mask, torch.zeros(3, 4, dtype=torch.int64)], 1)
        sides = ((ids, mask), longer)
        one, other = (taylor(model, [side], no_progress) for side in sides)
        np.testing.assert_allclose(one.values[1], other.values[1], rtol=1e-4)
        assert {k: v.tolist() for k, v in one.expert_tokens.items()} == {k: v.tolist() for k, v in other.expert_tokens.items()}


def test_no_tokens_or_not_finite_fails():
    model = tiny_model("llama")
    with pytest.raises(StepFailed, match="two tokens"):
        taylor(model, batches_of(((1, 1),)), no_progress)
    linear_map(blocks_of(model, anatomy_of(model))[1], "mlp.up_proj").weight.data[0, 0] = float("inf")
    with pytest.raises(StepFailed, match="not finite"):
        taylor(model, BATCHES, no_progress)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_by_plain_slices(family):
    model = tiny_model(family)
    blocks = blocks_of(model, anatomy_of(model))
    squares = [{n: p.detach().double().square() for n, p in block.named_parameters()} for block in blocks]
    found = magnitude_importance(in_memory(model), layout(model))
    assert_equals(found, by_block(model, squares), layout(model), 1e-5)


@pytest.mark.parametrize("family", [*WITH_HEADS[:1], *MIXTURES])
def test_random_follows_its_seed(family):
    groups = layout(tiny_model(family))
    one, same, other = (random_importance(groups, seed) for seed in (3, 3, 4))
    for index, kind in enumerate(groups.groups):
        assert np.array_equal(one.values[index], same.values[index])
        assert not np.array_equal(one.values[index], other.values[index])
        assert one.values[index].dtype == np.float32
        assert 0 < one.values[index].max() <= kind.params
