import numpy as np
import pytest
import torch
from pruning_models import FAMILIES, batches_of, no_progress, tiny_model

from finescope.config import PruneSection
from finescope.errors import RecipeError
from finescope.models.anatomy import anatomy_of
from finescope.pruning.prune import planned_tokens, prune_model
from finescope.pruning.verify import verify_saved
from finescope.schemas import IMPORTANCE

BATCHES = batches_of(((9, 6, 4), (7, 7)))


def section(**changes):
    return PruneSection(**({"ratio": 0.3, "round_to": 4} | changes))


@pytest.mark.parametrize("method", ["taylor", "magnitude", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_method(family, method):
    model = tiny_model(family)
    seen = []
    student, table, summary = prune_model(model, anatomy_of(model), section(method=method), BATCHES, seen.append)
    assert sum(seen) == planned_tokens(section(method=method), 33) == (66 if method == "taylor" else 33)
    assert abs(summary["ratio_reached"] - 0.3) < 0.05
    assert summary["parameters_after"] == student.num_parameters()
    removed = summary["block_parameters_before"] - summary["block_parameters_after"]
    assert removed == summary["parameters_before"] - summary["parameters_after"]
    assert table.schema == IMPORTANCE
    assert table.num_rows == 3 * (3 + 40)
    gone = table.filter(np.logical_not(table["kept"].to_numpy()))
    assert sum(gone["num_params"].to_pylist()) == removed
    assert set(table["layer"].to_pylist()) == {1, 2, 3}
    assert (summary["calibration_documents"], summary["calibration_tokens"]) == (5, 33)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_same_twice():
    one, two = (prune_model(m := tiny_model("llama"), anatomy_of(m), section(), BATCHES, no_progress) for _ in range(2))
    assert one.importance.equals(two.importance)
    assert one.summary == two.summary
    assert all(torch.equal(value, two.student.state_dict()[name]) for name, value in one.student.state_dict().items())


def test_ratio_zero_is_a_copy():
    model = tiny_model("qwen2")
    result = prune_model(model, anatomy_of(model), section(ratio=0.0), BATCHES, no_progress)
    assert result.summary["ratio_reached"] == 0
    assert not result.summary["compensated"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in result.student.state_dict().items())
    assert all(result.importance["kept"].to_pylist())


def test_compensation_can_be_left_out():
    model = tiny_model("llama")
    kwargs = {"structure": ("mlp",)}
    plain = prune_model(model, anatomy_of(model), section(compensate=False, **kwargs), BATCHES, no_progress)
    fitted = prune_model(model, anatomy_of(model), section(**kwargs), BATCHES, no_progress)
    assert plain.summary["refits"] == []
    differing = {n for n, v in plain.student.state_dict().items() if not torch.equal(v, fitted.student.state_dict()[n])}
    assert differing == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)}


def test_unreachable_ratio_is_a_recipe_error():
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match="largest reachable ratio"):
        prune_model(model, anatomy_of(model), section(ratio=0.9, method="random", structure=("mlp",)), BATCHES, no_progress)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_saved_student_is_the_same_in_a_fresh_process(family, tmp_path):
    # Of eight groups of three query heads five stay: fifteen heads do not divide d_model, so a Llama becomes a Mistral.
    model = tiny_model(family, num_attention_heads=24, num_key_value_heads=8, head_dim=4)
    result = prune_model(model, anatomy_of(model), section(ratio=0.25, structure=("heads",)), BATCHES, no_progress)
    assert result.summary["query_heads_after"] == 15
    result.student.save_pretrained(tmp_path)
    verified = verify_saved(tmp_path, result.student, BATCHES[0][0])
    assert verified.architecture == {"llama": "Mistral"}.get(family, family.capitalize()) + "ForCausalLM"
    assert verified.architecture == result.summary["architecture"]
    assert verified.difference <= 1e-5
    assert verified.num_generated == 4
