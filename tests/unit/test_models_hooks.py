from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, reference, saved_model

from finescope.models.hooks import HookPoint, capture, module_path
from finescope.models.load import load_model

MASKS = {
    "none": torch.ones(2, 6, dtype=torch.int64),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_capture_is_the_full_models_hidden_state(tmp_path: Path, family: str, padding: str) -> None:
    made = reference(saved_model(tmp_path, family))
    ids, mask = torch.arange(1, 13).reshape(2, 6), MASKS[padding]
    with torch.no_grad():
        states = load_model(made, device="cpu")(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for layer in (1, 2, 3):
        ours = capture(load_model(made, num_layers=layer, device="cpu"), ids, mask, [HookPoint(layer)])[0]
        assert torch.equal(ours, states[layer])


def test_last_block_is_captured_before_the_final_norm(tmp_path: Path) -> None:
    made = reference(saved_model(tmp_path, "llama"))
    model = load_model(made, device="cpu")
    ids = torch.arange(1, 13).reshape(2, 6)
    state = capture(model, ids, MASKS["none"], [HookPoint(4)])[0]
    with torch.no_grad():
        assert torch.equal(model.get_submodule("model.norm")(state), model.base_model(ids).last_hidden_state)


def test_head_is_not_run_and_no_hook_stays(tmp_path: Path) -> None:
    model = load_model(reference(saved_model(tmp_path, "llama")), device="cpu")

    def fail(*_: object) -> None:
        raise AssertionError("the head was run")

    model.get_submodule("lm_head").register_forward_hook(fail)
    capture(model, torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64), [HookPoint(2)])
    block = model.get_submodule(module_path(model, HookPoint(2)))
    assert not block._forward_hooks
