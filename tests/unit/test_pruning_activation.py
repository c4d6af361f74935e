import numpy as np
import pytest
import torch
from pruning_models import DENSE, FAMILIES, FIXED_HEADS, MIXTURES, batches_of, in_memory, layout, tiny_model

from finescope.errors import StepFailed
from finescope.models.anatomy import anatomy_of, blocks_of, linear_map
from finescope.pruning.activation import activation_importance
from finescope.pruning.ridge import OutputMap

BATCHES = batches_of(((9, 6, 2), (7, 1)))


def found_by(model, measure, batches=BATCHES):
    seen = []
    found = activation_importance(in_memory(model), layout(model), measure, batches, seen.append)
    assert sum(seen) == sum(int(mask.sum()) for _, mask in batches)
    return found


def inputs_by_hooks(model, name):
    """What a map of each block is given in whole forward passes, neither padding nor position 0: [tokens, in] a block."""
    blocks, caught = blocks_of(model, anatomy_of(model)), {}
    for number, block in enumerate(blocks):
        note = lambda _, arguments, number=number: caught.setdefault(number, []).append(arguments[0])  # noqa: E731
        linear_map(block, name).register_forward_pre_hook(note)
    chosen = []
    with torch.no_grad():
        for ids, mask in BATCHES:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            chosen.append(mask.bool())
            chosen[-1][:, 0] = False
    return [torch.cat([x[m] for x, m in zip(caught[number], chosen, strict=True)]).double() for number in range(len(blocks))]


def share(values):
    return (values / values.sum()).numpy()


def by_layer(model, kind, name):
    """What was found of a kind, both measures, and what its map `name` is given: inputs, and the fluctuation of each."""
    anatomy, which = anatomy_of(model), [groups.kind for groups in layout(model).groups].index(kind)
    activation, wifv = (found_by(model, measure).values[which] for measure in ("activation", "wifv"))
    for layer, inputs in enumerate(inputs_by_hooks(model, name)):
        weight = OutputMap(blocks_of(model, anatomy)[layer], name, None).weight.double()
        fluctuation = inputs.var(dim=0, unbiased=False) * weight.square().sum(dim=0)
        yield activation[layer, 0], wifv[layer, 0], inputs, fluctuation


@pytest.mark.parametrize("family", DENSE)
def test_channels_equal_hooks_on_whole_passes(family):
    model = tiny_model(family)
    for activation, wifv, inputs, fluctuation in by_layer(model, "mlp", anatomy_of(model).down):
        np.testing.assert_allclose(activation, share(inputs.square().mean(dim=0).sqrt()), rtol=1e-4)
        np.testing.assert_allclose(wifv, share(fluctuation), rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FIXED_HEADS])
def test_heads_equal_hooks_on_whole_passes(family):
    model = tiny_model(family)
    for activation, wifv, inputs, fluctuation in by_layer(model, "heads", anatomy_of(model).output):
        heads = inputs.square().mean(dim=0).reshape(3, 16).sum(dim=1).sqrt()
        np.testing.assert_allclose(activation, share(heads), rtol=1e-4)
        np.testing.assert_allclose(wifv, share(fluctuation.reshape(3, 16).sum(dim=1)), rtol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("measure", ["activation", "wifv"])
def test_an_expert_has_the_sum_of_its_channels(family, measure):
    model = tiny_model(family)
    groups, found = layout(model).groups, found_by(model, measure)
    experts = next(values for of, values in zip(groups, found.values, strict=True) if of.kind == "experts")
    channels = next(values for of, values in zip(groups, found.values, strict=True) if of.by_expert)
    np.testing.assert_allclose(experts[:, 0], channels.sum(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(channels.sum(axis=(1, 2)), 1.0, rtol=1e-5)
    # 25 tokens but the 5 at position 0, two experts each.
    assert [int(tokens.sum()) for tokens in found.expert_tokens.values()] == [40] * len(experts)


def test_a_constant_input_does_not_fluctuate():
    model = tiny_model("gpt2")
    first = blocks_of(model, anatomy_of(model))[0].get_submodule("mlp.c_fc")
    with torch.no_grad():
        first.weight[:, 7] = 0.0
        first.bias[7] = 3.0
    assert found_by(model, "wifv").values[0][0, 0, 7] < 1e-9
    assert found_by(model, "activation").values[0][0, 0, 7] > 1 / 40


def test_documents_of_one_token_say_nothing():
    with pytest.raises(StepFailed, match="no calibration document has two tokens"):
        found_by(tiny_model("llama"), "wifv", batches_of(((1, 1),)))
