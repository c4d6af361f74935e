import numpy as np
import pytest
import torch
from pruning_models import MIXTURES, batches_of, compensate, cut, kept_of, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from finescope.errors import StepFailed
from finescope.models.anatomy import anatomy_of, blocks_of, has_experts, linear_map
from finescope.pruning import readers
from finescope.pruning.ridge import Moments, OutputMap, ridge

BATCHES = batches_of(((9, 6, 4), (7, 7), (11, 9, 8), (30, 28)))
FEWER, ONLY_MLP = {"heads": 2, "mlp": 20}, {"mlp": 20}


def student_of(model, counts):
    return cut(model, kept_of(model, **counts))


def ridge_by_lstsq(inputs, target, weight):
    """The same problem as plain least squares: a row of sqrt(ridge) for each input channel, with the old weight as target."""
    moments = (inputs**2).sum(0)
    penalty = np.sqrt(0.1 * moments + 1e-8 * moments.mean())
    rows, targets = np.vstack([inputs, np.diag(penalty)]), np.vstack([target, penalty[:, None] * weight.T])
    return np.linalg.lstsq(rows, targets, rcond=None)[0].T


def test_refit_equals_lstsq():
    torch.manual_seed(0)
    inputs, residual = torch.randn(30, 5) * torch.tensor([1, 5, 0.1, 1, 0]), torch.randn(30, 3)
    moments = Moments(5, 3, torch.device("cpu"))
    for start in range(0, 30, 10):
        moments.add(inputs[start : start + 10], residual[start : start + 10])
    expected = ridge_by_lstsq(inputs.double().numpy(), residual.double().numpy(), np.zeros((3, 5)))
    np.testing.assert_allclose(moments.change("down").T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_error_of_an_output_map(transposed):
    torch.manual_seed(0)
    block = nn.Module()
    block.down = Conv1D(3, 5) if transposed else nn.Linear(5, 3)
    output, moments = OutputMap(block, "down", None), Moments(5, 3, torch.device("cpu"))
    inputs, target = torch.randn(30, 5), torch.randn(30, 3)
    before = output.add_to(moments, inputs, target)
    assert before == pytest.approx(((target - block.down(inputs)) ** 2).sum().item(), rel=1e-5)
    output.weight += output.change(moments, "down").float()
    after = output.error(inputs, target)
    assert after == pytest.approx(((target - block.down(inputs)) ** 2).sum().item(), rel=1e-5)
    assert after < before


def test_ridge_by_hand_and_a_silent_channel():
    # One channel: (10 + 1) dW = 11. A channel that is never active keeps its weight.
    gram, cross = torch.diag(torch.tensor([10.0, 0.0])).double(), torch.tensor([[11.0], [0.0]]).double()
    np.testing.assert_allclose(ridge(gram, cross), [[1.0], [0.0]], rtol=1e-7)
    assert ridge(torch.zeros(2, 2).double(), torch.zeros(2, 1).double()).tolist() == [[0.0], [0.0]]


def naive_refit(module, norm, inputs, target):
    """A map's ridge solution; through a norm that of the problem where every token's rms stays what it is."""
    weight = module.weight.detach().double().numpy()
    weight = weight.T if isinstance(module, Conv1D) else weight
    bias = 0 if module.bias is None else module.bias.detach().double().numpy()
    if norm is None:
        found = ridge_by_lstsq(inputs, target - bias, weight)
    else:
        output = inputs @ weight.T + bias
        scale = np.sqrt((output**2).mean(1, keepdims=True))
        through = lambda values: norm(torch.from_numpy(values).float()).detach().double().numpy()  # noqa: E731
        gain = through(np.ones((1, len(weight))))[0]
        change = ridge_by_lstsq(inputs / scale, target - through(output), np.zeros_like(weight))
        found = weight + change * (gain / (gain**2 + 1e-3 * (gain**2).mean()))[:, None]
        errors = [((target - through(inputs @ each.T + bias)) ** 2).sum() for each in (weight, found)]
        found = found if errors[1] < errors[0] else weight
    found = torch.from_numpy(found)
    module.weight.data.copy_(found.T if isinstance(module, Conv1D) else found)


def naive_readers(block, names, pruned, dense):
    """Each map that reads the stream on its own: least squares towards what its weight makes of what the dense model's reads."""
    for module in (block.get_submodule(name) for name in names):
        weight = module.weight.detach().double().numpy()
        weight = weight.T if isinstance(module, Conv1D) else weight
        found = torch.from_numpy(ridge_by_lstsq(pruned, dense @ weight.T, weight))
        module.weight.data.copy_(found.T if isinstance(module, Conv1D) else found)


def naive_compensation(model, student, anatomy):
    """Layer by layer with whole forward passes: what the streamed version must equal."""

    def run(owner, layer):
        """Of block `layer`, per chosen token: what the attention reads, the output map's input, the stream before, with attention
        added, what the MLP reads, the down map's input, MLP added."""
        block, seen = blocks_of(owner, anatomy)[layer], {}
        names = {"heads": anatomy.output, "channels": anatomy.down, "query": anatomy.qkv[0], "expand": anatomy.expand[0]}
        added = {"attention": anatomy.attention_norm or anatomy.output, "mlp": anatomy.mlp_norm or anatomy.down}
        keep_input = lambda key: lambda module, inputs, output: seen.__setitem__(key, inputs[0])  # noqa: E731
        keep_output = lambda key: lambda module, inputs, output: seen.__setitem__(key, output)  # noqa: E731
        hooks = [block.get_submodule(name).register_forward_hook(keep_input(key)) for key, name in names.items()]
        hooks += [block.get_submodule(name).register_forward_hook(keep_output(key)) for key, name in added.items()]
        rows = []
        for ids, mask in BATCHES:
            with torch.no_grad():
                out = owner(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            before = out.hidden_states[layer]
            keep = mask.bool()
            keep[:, 0] = False
            middle = before + seen["attention"]
            parts = (seen["query"], seen["heads"], before, middle, seen["expand"], seen["channels"], middle + seen["mlp"])
            rows.append([part[keep].double().numpy() for part in parts])
        for hook in hooks:
            hook.remove()
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    for layer, block in enumerate(blocks_of(student, anatomy)):
        norms = [block.get_submodule(name) if name else None for name in (anatomy.attention_norm, anatomy.mlp_norm)]
        dense_query, _, _, dense_middle, dense_expand, _, dense_after = run(model, layer)
        output, down = linear_map(block, anatomy.output), linear_map(block, anatomy.down)
        if layer:  # both models read the same in the first block
            naive_readers(block, anatomy.qkv, run(student, layer)[0], dense_query)
        _, heads, before, _, _, _, _ = run(student, layer)
        naive_refit(output, norms[0], heads, dense_middle - before)
        naive_readers(block, anatomy.expand, run(student, layer)[4], dense_expand)
        _, _, _, middle, _, channels, _ = run(student, layer)
        naive_refit(down, norms[1], channels, dense_after - middle)


CASES = [
    *((family, FEWER) for family in ("llama", "qwen3", "gemma2", "phi3", "olmo2")),
    *((family, ONLY_MLP) for family in ("qwen2", "gemma3_text", "gpt2", "gpt_neox")),
]


@pytest.mark.parametrize(("family", "counts"), CASES)
def test_streamed_equals_naive(family, counts, monkeypatch):
    monkeypatch.setattr(readers, "_TOKENS_PER_DIMENSION", 1)
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    student, naive = student_of(model, counts), student_of(model, counts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = {name: value.clone() for name, value in student.state_dict().items()}
    refits = compensate(model, student, BATCHES)
    naive_compensation(model, naive, anatomy)
    reads = {f"{anatomy.qkv[0]} reads": anatomy.qkv, f"{anatomy.mlp} reads": anatomy.expand}
    maps = {**reads, anatomy.output: (anatomy.output,), anatomy.down: (anatomy.down,)}
    refitted = {tuple(refit.name.removeprefix(f"{anatomy.blocks}.").split(".", 1)) for refit in refits}
    assert refitted >= {(str(layer), name) for layer in range(1, 3) for name in maps}
    changed = {f"{anatomy.blocks}.{layer}.{name}.weight" for layer, key in refitted for name in maps[key]}
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, naive.state_dict()[name], rtol=2e-3, atol=5e-4)
        assert name in changed or torch.equal(value, original[name]), name
    assert all(refit.error_after <= refit.error_before for refit in refits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def naive_experts(model, student, anatomy, layer, batches):
    """Re-fit the experts of one block, one after the other, each by least squares on what is then missing; in place."""
    block, seen = blocks_of(student, anatomy)[layer], []
    experts = block.get_submodule("mlp.experts")
    hook = experts.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    parts = []
    for ids, mask in batches:
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]
            got = student(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]
        keep = mask.bool().clone()
        keep[:, 0] = False
        hidden, chosen, weights = (part[keep.reshape(-1)] for part in seen.pop() if isinstance(part, torch.Tensor))
        parts.append(((want - got)[keep], hidden, chosen, weights))
        seen.clear()
    hook.remove()
    missing, hidden, chosen, weights = (torch.cat(part).double().numpy() for part in zip(*parts, strict=True))
    gate_up, down = (experts.get_parameter(name).detach().double().numpy() for name in ("gate_up_proj", "down_proj"))
    channels, left_out = down.shape[2], 0
    for expert in range(len(down)):
        tokens, slots = np.nonzero(chosen == expert)
        if len(tokens) < channels:
            left_out += 1
            continue
        gate, up = np.split(hidden[tokens] @ gate_up[expert].T, 2, axis=1)
        inputs = gate / (1 + np.exp(-gate)) * up * weights[tokens, slots][:, None]
        change = ridge_by_lstsq(inputs, missing[tokens], np.zeros_like(down[expert]))
        missing[tokens] -= inputs @ change.T
        experts.get_parameter("down_proj").data[expert] += torch.from_numpy(change)
    return left_out


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_refitted_on_their_own_tokens(family):
    torch.manual_seed(0)
    model = tiny_model(family, **({} if family == "mixtral" else {"mlp_only_layers": [2]}))
    anatomy = anatomy_of(model)
    counts = {"heads": 3, "mlp": 8, "experts": 3}
    batches = batches_of(((20, 15, 9), (18, 18)))
    student, naive = student_of(model, counts), student_of(model, counts)
    refits = compensate(model, student, batches)
    left_out = [naive_experts(model, naive, anatomy, 0, batches)]
    name = "model.layers.0.mlp.experts.down_proj"
    torch.testing.assert_close(student.state_dict()[name], naive.state_dict()[name], rtol=2e-3, atol=2e-4)
    of_mlp = [refit for refit in refits if refit.name.endswith(("mlp.experts", "mlp.down_proj"))]
    assert of_mlp[0].name == "model.layers.0.mlp.experts"
    assert of_mlp[0].experts_left_out == left_out[0] < 3
    for refit, block in zip(of_mlp, blocks_of(student, anatomy), strict=True):
        assert refit.error_after < refit.error_before
        assert (refit.experts_left_out is None) != has_experts(block, anatomy)


def test_experts_with_too_few_tokens_keep_their_weights():
    model = tiny_model("mixtral")
    student = student_of(model, {"experts": 3})
    original = {name: value.clone() for name, value in student.state_dict().items()}
    # Ten tokens that count, two experts each, 40 channels.
    refits = compensate(model, student, batches_of(((6, 6),)))
    assert [refit.experts_left_out for refit in refits if refit.name.endswith("experts")] == [3, 3, 3]
    assert all(torch.equal(value, original[name]) for name, value in student.state_dict().items() if ".o_proj." not in name)


# Routers choose otherwise where the stream is another, which no re-fit mends.
@pytest.mark.parametrize(("family", "most"), [("llama", 0.95), ("gemma2", 0.95), ("gpt_neox", 0.95), ("mixtral", 0.99)])
def test_follows_the_dense_model_on_other_documents(family, most):
    torch.manual_seed(0)
    model = tiny_model(family)
    calibration, other = batches_of(((30,) * 16,) * 4), batches_of(((30,) * 8,), seed=1)
    plain, fitted = (student_of(model, {"mlp": 16 if family in MIXTURES else 20}) for _ in range(2))
    compensate(model, fitted, calibration)
    ids, mask = other[0]
    with torch.no_grad():
        streams = (owner.get_decoder()(input_ids=ids, attention_mask=mask) for owner in (model, plain, fitted))
        want, without, found = (stream.last_hidden_state for stream in streams)
    assert (found - want).square().mean() < most * (without - want).square().mean()


def test_a_model_with_everything_kept_stays_the_same():
    model = tiny_model("qwen3")
    student = student_of(model, {})
    compensate(model, student, BATCHES)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_activations_that_are_not_finite_fail():
    moments = Moments(2, 2, torch.device("cpu"))
    moments.add(torch.tensor([[1.0, float("inf")]]), torch.zeros(1, 2))
    with pytest.raises(StepFailed, match="activations at down are not finite"):
        moments.change("down")


def test_no_tokens_fails():
    model = tiny_model("llama")
    with pytest.raises(StepFailed, match="two tokens"):
        compensate(model, student_of(model, FEWER), batches_of(((1, 1),)))
