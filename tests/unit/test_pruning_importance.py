import numpy as np
import pytest
import torch
from pruning_models import FAMILIES, batches_of, no_progress, tiny_model

from finescope.errors import StepFailed
from finescope.models.anatomy import anatomy_of, blocks_of, linear
from finescope.pruning import importance as module
from finescope.pruning.groups import groups_of
from finescope.pruning.importance import magnitude_importance, random_importance, taylor_importance

BATCHES = batches_of(((9, 6, 2), (7, 1)))


def naive_taylor(model, anatomy, batches):
    """sum |w * g| of each group over all gradients at once, from the model's own loss, group by group in plain slices."""
    heads, mlp, total = 0, 0, 0
    for ids, mask in batches:
        labels = torch.where(mask.bool(), ids, -100)
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        tokens = int(mask[:, 1:].sum())
        products = []
        for block in blocks_of(model, anatomy):
            products.append(
                {name: (p.detach() * p.grad).abs().double() for name, p in block.named_parameters() if "norm" not in name}
            )
        heads = heads + tokens * torch.stack([naive_heads(block) for block in products])
        mlp = mlp + tokens * torch.stack([naive_channels(block) for block in products])
        total += tokens
    return heads / total, mlp / total


def naive_heads(values):
    sums = []
    for head in range(3):
        query, key = slice(16 * head, 16 * head + 16), slice(8 * head, 8 * head + 8)
        rows = [(name, query if ".q_proj" in name else key) for name in values if any(x in name for x in (".q_", ".k_", ".v_"))]
        sums.append(sum(values[name][part].sum() for name, part in rows) + values["self_attn.o_proj.weight"][:, query].sum())
    return torch.stack(sums)


def naive_channels(values):
    total = values["mlp.gate_proj.weight"].sum(1) + values["mlp.up_proj.weight"].sum(1) + values["mlp.down_proj.weight"].sum(0)
    for name in ("mlp.gate_proj.bias", "mlp.up_proj.bias"):
        total = total + values.get(name, 0)
    return total


@pytest.mark.parametrize(
    ("family", "changes"), [*((name, {}) for name in FAMILIES), ("llama", {"attention_bias": True, "mlp_bias": True})]
)
def test_streamed_taylor_equals_naive(family, changes, monkeypatch):
    monkeypatch.setattr(module, "_LOGIT_ROWS", 5)
    model = tiny_model(family, **changes)
    anatomy = anatomy_of(model)
    heads, mlp = naive_taylor(model, anatomy, BATCHES)
    model.zero_grad()
    seen = []
    found = taylor_importance(model, anatomy, BATCHES, seen.append)
    np.testing.assert_allclose(np.stack(found.heads), heads, rtol=2e-4)
    np.testing.assert_allclose(np.stack(found.mlp), mlp, rtol=2e-4)
    assert seen == [17, 8]


def test_gradients_are_freed_one_by_one_and_the_model_is_left_as_it_was(monkeypatch):
    model = tiny_model("qwen2").train()
    anatomy = anatomy_of(model)
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    alive = []
    original = module.group_sums

    def counting(values, part):
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return original(values, part)

    monkeypatch.setattr(module, "group_sums", counting)
    taylor_importance(model, anatomy, BATCHES[:1], no_progress)
    assert max(alive) == 1
    assert len(alive) == 3 * 10  # three blocks of seven weights and three biases
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.training
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_padding_does_not_matter():
    model = tiny_model("llama")
    ids, mask = BATCHES[0]
    longer = torch.cat([ids, torch.full((3, 4), 11)], 1), torch.cat([mask, torch.zeros(3, 4, dtype=torch.int64)], 1)
    one, other = (taylor_importance(model, anatomy_of(model), [batch], no_progress) for batch in ((ids, mask), longer))
    np.testing.assert_allclose(np.stack(one.mlp), np.stack(other.mlp), rtol=1e-4)


def test_no_tokens_or_not_finite_fails():
    model = tiny_model("llama")
    with pytest.raises(StepFailed, match="two tokens"):
        taylor_importance(model, anatomy_of(model), batches_of(((1, 1),)), no_progress)
    linear(blocks_of(model, anatomy_of(model))[1], "mlp.up_proj").weight.data[0, 0] = float("inf")
    with pytest.raises(StepFailed, match="not finite"):
        taylor_importance(model, anatomy_of(model), BATCHES, no_progress)


def test_magnitude_by_hand():
    model = tiny_model("qwen2")
    anatomy = anatomy_of(model)
    found = magnitude_importance(model, anatomy)
    values = {name: p.detach().double().square() for name, p in blocks_of(model, anatomy)[2].named_parameters()}
    np.testing.assert_allclose(found.heads[2], naive_heads(values), rtol=1e-5)
    np.testing.assert_allclose(found.mlp[2], naive_channels(values), rtol=1e-5)


def test_random_follows_its_seed():
    groups = groups_of(model := tiny_model("llama"), anatomy_of(model))
    one, same, other = (random_importance(groups, seed) for seed in (3, 3, 4))
    assert np.array_equal(np.stack(one.mlp), np.stack(same.mlp))
    assert not np.array_equal(np.stack(one.mlp), np.stack(other.mlp))
    assert one.heads[0].dtype == np.float32
    assert one.heads[0].max() <= groups.head_params
