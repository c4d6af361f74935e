import numpy as np
import pytest
import torch
from pruning_models import FAMILIES, batches_of, no_progress, tiny_model
from torch import nn

from finescope.errors import StepFailed
from finescope.models.anatomy import anatomy_of, blocks_of, linear
from finescope.pruning.allocation import Kept
from finescope.pruning.compensation import Moments, compensate, ridge
from finescope.pruning.groups import groups_of
from finescope.pruning.surgery import cut

BATCHES = batches_of(((9, 6, 4), (7, 7), (11, 9, 8)))
FEWER = Kept([np.array([0, 2])] * 3, [np.arange(0, 40, 2)] * 3)
ONLY_MLP = Kept([np.arange(3)] * 3, [np.arange(0, 40, 2)] * 3)


def student_of(model, kept):
    return cut(model, anatomy_of(model), groups_of(model, anatomy_of(model)), kept)


def ridge_by_lstsq(inputs, target, weight):
    """The same problem as plain least squares: a row of sqrt(ridge) for each input channel, with the old weight as target."""
    moments = (inputs**2).sum(0)
    penalty = np.sqrt(0.1 * moments + 1e-8 * moments.mean())
    rows, targets = np.vstack([inputs, np.diag(penalty)]), np.vstack([target, penalty[:, None] * weight.T])
    return np.linalg.lstsq(rows, targets, rcond=None)[0].T


def test_refit_equals_lstsq():
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    weight, bias = (parameter.detach().double().numpy().copy() for parameter in module.parameters())
    inputs, target = torch.randn(30, 5) * torch.tensor([1, 5, 0.1, 1, 0]), torch.randn(30, 3)
    moments = Moments(module)
    for start in range(0, 30, 10):
        moments.add(inputs[start : start + 10], target[start : start + 10])
    refit = moments.refit("down")
    expected = ridge_by_lstsq(inputs.double().numpy(), target.double().numpy() - bias, weight)
    np.testing.assert_allclose(module.weight.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    error = ((target - module(inputs)) ** 2).sum() / (target**2).sum()
    assert refit.error_after == pytest.approx(error.item(), rel=1e-4)
    assert refit.error_after < refit.error_before


def test_ridge_by_hand_and_a_silent_channel():
    # One channel: (10 + 1) dW = 11. A channel that is never active keeps its weight.
    gram, cross = torch.diag(torch.tensor([10.0, 0.0])).double(), torch.tensor([[11.0], [0.0]]).double()
    np.testing.assert_allclose(ridge(gram, cross), [[1.0], [0.0]], rtol=1e-7)
    assert ridge(torch.zeros(2, 2).double(), torch.zeros(2, 1).double()).tolist() == [[0.0], [0.0]]


def naive_compensation(model, student, anatomy):
    """Layer by layer with whole forward passes: what the streamed version must equal."""

    def run(owner, layer):
        """Of block `layer`, per chosen token: o_proj's input, stream before, after the attention, down's input, stream after."""
        block, seen = blocks_of(owner, anatomy)[layer], []
        hooks = [
            linear(block, anatomy.output).register_forward_hook(lambda m, a, o: seen.extend([a[0], o])),
            linear(block, anatomy.down).register_forward_hook(lambda m, a, o: seen.extend([a[0], o])),
        ]
        rows = []
        for ids, mask in BATCHES:
            seen.clear()
            with torch.no_grad():
                before = owner(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer]
            heads, attention, channels, down = seen
            keep = mask.bool()
            keep[:, 0] = False
            parts = (heads, before, before + attention, channels, before + attention + down)
            rows.append([part[keep].double().numpy() for part in parts])
        for hook in hooks:
            hook.remove()
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    for layer, block in enumerate(blocks_of(student, anatomy)):
        _, _, dense_middle, _, dense_after = run(model, layer)
        output, down = linear(block, anatomy.output), linear(block, anatomy.down)
        if output.in_features < linear(blocks_of(model, anatomy)[layer], anatomy.output).in_features:
            heads, before, _, _, _ = run(student, layer)
            solution = ridge_by_lstsq(heads, dense_middle - before, output.weight.detach().double().numpy())
            output.weight.data.copy_(torch.from_numpy(solution))
        _, _, middle, channels, _ = run(student, layer)
        solution = ridge_by_lstsq(channels, dense_after - middle, down.weight.detach().double().numpy())
        down.weight.data.copy_(torch.from_numpy(solution))


@pytest.mark.parametrize("kept", [FEWER, ONLY_MLP], ids=["heads", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_naive(family, kept):
    model = tiny_model(family)
    student, naive = student_of(model, kept), student_of(model, kept)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = {name: value.clone() for name, value in student.state_dict().items()}
    seen = []
    refits = compensate(model, student, anatomy_of(model), BATCHES, seen.append)
    naive_compensation(model, naive, anatomy_of(model))
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, naive.state_dict()[name], rtol=2e-3, atol=2e-4)
        refitted = "down_proj" in name or ("o_proj" in name and kept is FEWER)
        assert torch.equal(value, original[name]) != refitted, name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    maps = ("self_attn.o_proj", "mlp.down_proj") if kept is FEWER else ("mlp.down_proj",)
    assert [refit.name for refit in refits] == [f"model.layers.{layer}.{name}" for layer in range(3) for name in maps]
    assert all(refit.error_after < refit.error_before for refit in refits)
    assert sum(seen) == sum(int(mask.sum()) for _, mask in BATCHES)
    assert len(seen) == 3


def test_follows_the_dense_model_on_other_documents():
    torch.manual_seed(0)
    model = tiny_model("llama")
    calibration, other = batches_of(((30,) * 16,) * 4), batches_of(((30,) * 8,), seed=1)
    plain, fitted = student_of(model, ONLY_MLP), student_of(model, ONLY_MLP)
    compensate(model, fitted, anatomy_of(model), calibration, no_progress)
    ids, mask = other[0]
    with torch.no_grad():
        streams = (owner.get_decoder()(input_ids=ids, attention_mask=mask) for owner in (model, plain, fitted))
        want, without, found = (stream.last_hidden_state for stream in streams)
    assert (found - want).square().mean() < 0.95 * (without - want).square().mean()


def test_a_model_with_everything_kept_stays_the_same():
    model = tiny_model("qwen3")
    student = student_of(model, Kept([np.arange(3)] * 3, [np.arange(40)] * 3))
    compensate(model, student, anatomy_of(model), BATCHES, no_progress)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_activations_that_are_not_finite_fail():
    moments = Moments(nn.Linear(2, 2))
    moments.add(torch.tensor([[1.0, float("inf")]]), torch.zeros(1, 2))
    with pytest.raises(StepFailed, match="activations at down are not finite"):
        moments.refit("down")


def test_no_tokens_fails():
    model = tiny_model("llama")
    with pytest.raises(StepFailed, match="two tokens"):
        compensate(model, student_of(model, FEWER), anatomy_of(model), batches_of(((1, 1),)), no_progress)
