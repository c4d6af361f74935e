import pytest
import torch
from pruning_models import FAMILIES, MIXTURES, batches_of, compensate, shallow, tiny_model

from finescope.models.anatomy import anatomy_of
from finescope.pruning import readers

BATCHES = batches_of(((9, 6, 4), (7, 7), (12,)))


def at(model, module, output=False):
    """What a module reads, or adds, at the chosen tokens (padding and position 0 left out): float32 [tokens, d_model]."""
    seen = []
    note = lambda _, inputs, outputs: seen.append(outputs if output else inputs[0])  # noqa: E731
    handle = model.get_submodule(module).register_forward_hook(note)
    for ids, mask in BATCHES:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
    handle.remove()
    masks = [mask.bool() & (torch.arange(mask.shape[1]) > 0) for _, mask in BATCHES]
    return torch.cat([states[mask] for states, mask in zip(seen, masks, strict=True)])


@pytest.mark.parametrize("kept", [(0, 1), (0, 2), (1, 2), (2,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_re_fit_brings_the_shallower_model_nearer_to_the_dense_one(family, kept):
    model = tiny_model(family)
    plain, fitted = shallow(model, kept), shallow(model, kept)
    refits = compensate(model, fitted, BATCHES, kept)
    assert len(refits) >= 2 * len(kept)
    norm = anatomy_of(model).final_norm
    before, after = ((at(student, norm) - at(model, norm)).square().sum().item() for student in (plain, fitted))
    if family in MIXTURES:
        assert after <= before * (1 + 1e-5), "experts with fewer tokens than channels keep their weights"
    else:
        assert after < before


# The first map that is re-fitted with something missing, and what reads the stream after it in the student and the dense model.
GAPS = {
    (0, 2): (2, "self_attn.o_proj", "model.layers.1.post_attention_layernorm", "model.layers.2.post_attention_layernorm"),
    (0, 1): (3, "mlp.down_proj", "model.norm", "model.norm"),
}


@pytest.mark.parametrize("kept", GAPS)
def test_the_block_after_a_gap_or_the_last_one_makes_up_for_it(kept):
    model = tiny_model("llama")
    plain, fitted = shallow(model, kept), shallow(model, kept)
    refits = compensate(model, fitted, BATCHES, kept)
    first, name, after, dense_after = GAPS[kept]
    assert [refit.error_before for refit in refits[:first]] == pytest.approx([0] * first, abs=1e-10)
    assert refits[first].name == f"model.layers.1.{name}"
    missing = at(model, dense_after) - at(plain, after)
    target = missing + at(plain, refits[first].name, output=True)
    assert refits[first].error_before == pytest.approx((missing.square().sum() / target.square().sum()).item(), rel=1e-4)
    assert refits[first].error_after < refits[first].error_before


def test_the_block_after_a_gap_reads_what_it_would_have_read(monkeypatch):
    monkeypatch.setattr(readers, "_TOKENS_PER_DIMENSION", 0)
    model, kept = tiny_model("llama"), (1, 2)
    plain, fitted = shallow(model, kept), shallow(model, kept)
    refit, *_ = compensate(model, fitted, BATCHES, kept)
    assert refit.name == "model.layers.0.self_attn.q_proj reads"
    read, would_read = at(plain, "model.layers.0.self_attn.q_proj"), at(model, "model.layers.1.self_attn.q_proj")
    assert refit.error_before == pytest.approx(((would_read - read).square().sum() / would_read.square().sum()).item(), rel=1e-4)
    assert refit.error_after < refit.error_before
