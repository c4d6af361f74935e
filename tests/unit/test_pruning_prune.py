import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pruning_models import FAMILIES, FIXED_HEADS, MIXTURES, batches_of, no_progress, prune, tiny_model

from finescope.config import PruneSection
from finescope.errors import RecipeError
from finescope.pruning import reload_check
from finescope.pruning.prune import planned_tokens
from finescope.pruning.verify import verify_saved
from finescope.schemas import IMPORTANCE

BATCHES = batches_of(((9, 6, 4), (7, 7)))


def section(**changes):
    return PruneSection(**({"ratio": 0.3, "round_to": 4} | changes))


@functools.cache
def quartered(family):
    """The model, what is left of it without a quarter, and the progress that was told."""
    model, seen = tiny_model(family), []
    return model, prune(model, section(ratio=0.25), BATCHES, seen.append), seen


def removed_params(table):
    """Parameters of all groups that leave; channels of an expert that leaves are counted with it."""
    rows = pl.from_arrow(table)
    experts = rows.filter(kind="experts", kept=False).select("layer", expert="group_index")
    channels = rows.filter(kind="mlp").with_columns(channels=pl.len().over("layer"))
    in_experts = rows.filter(kind="experts").select("layer", count=pl.len().over("layer")).unique()
    channels = channels.join(in_experts, on="layer", how="left").with_columns(
        expert=pl.col("group_index") // (pl.col("channels") // pl.col("count"))
    )
    gone_with_expert = channels.join(experts, on=["layer", "expert"], how="semi")
    assert not gone_with_expert["kept"].any()
    return rows.filter(kept=False)["num_params"].sum() - gone_with_expert["num_params"].sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model, (student, table, summary, _), seen = quartered(family)
    assert sum(seen) == planned_tokens(section(), 33) == 66
    # Channels of experts stay by eights: half a step is a tenth of them.
    assert abs(summary["ratio_reached"] - 0.25) < (0.1 if family in MIXTURES else 0.05)
    assert summary["parameters_after"] == student.num_parameters()
    removed = summary["block_parameters_before"] - summary["block_parameters_after"]
    assert removed == summary["parameters_before"] - summary["parameters_after"] == removed_params(table)
    assert table.schema == IMPORTANCE
    heads = 0 if family in FIXED_HEADS else 3
    rows = {"mixtral": 3 * (3 + 4 + 4 * 40), "qwen3_moe": 3 * 3 + 2 * (4 + 4 * 20) + 40}.get(family, 3 * (heads + 40))
    assert table.num_rows == rows
    assert set(table["layer"].to_pylist()) == {1, 2, 3}
    assert (summary["calibration_documents"], summary["calibration_tokens"]) == (5, 33)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert ("experts_without_tokens" in summary) == (family in MIXTURES) == ("experts_not_refitted" in summary)
    json.dumps(summary)


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3_moe"])
def test_methods_without_gradients(family, method):
    model = tiny_model(family)
    seen = []
    given = section(ratio=0.25, method=method, compensate=False)
    _, table, summary, _ = prune(model, given, BATCHES, seen.append)
    assert abs(summary["ratio_reached"] - 0.25) < (0.1 if family in MIXTURES else 0.05)
    assert seen == []
    assert summary["block_parameters_before"] - summary["block_parameters_after"] == removed_params(table)
    assert np.isfinite(table["importance"].to_numpy()).all()


_RELOAD_ALL = """
import json, runpy, sys
import numpy as np
compare = runpy.run_path(sys.argv[1])["compare"]
found = {}
for directory in sys.argv[2:]:
    with np.load(directory + ".npz") as given:
        cases = [tuple(given[f"{name}_{n}"] for name in ("input_ids", "attention_mask", "logits")) for n in range(3)]
    found[directory] = compare(directory, "cpu", -1, cases)
assert "finescope" not in sys.modules
print(json.dumps(found))
"""


def test_every_family_is_the_same_in_a_fresh_process(tmp_path):
    # What `verify_saved` runs for one directory, in one process for all of them.
    for family in FAMILIES:
        result = quartered(family)[1]
        result.student.save_pretrained(tmp_path / family)
        arrays = {f"{key}_{number}": value for number, case in enumerate(result.cases) for key, value in case._asdict().items()}
        np.savez(tmp_path / f"{family}.npz", **arrays)
    directories = [str(tmp_path / family) for family in FAMILIES]
    command = [sys.executable, "-P", "-c", _RELOAD_ALL, str(Path(reload_check.__file__)), *directories]
    process = subprocess.run(command, capture_output=True, check=False, text=True)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    for family, directory in zip(FAMILIES, directories, strict=True):
        answer = found[directory]
        assert answer["keys"] == []
        assert answer["difference"] <= 1e-5 * answer["largest"], family
        assert answer["cached"] <= 1e-4, family
        assert answer["architecture"] == quartered(family)[1].summary["architecture"]
        assert (answer["dtype"], answer["generated"]) == ("torch.float32", 4)


def test_the_same_twice():
    one, two = (prune(tiny_model("llama"), section(), BATCHES, no_progress) for _ in range(2))
    assert one.importance.equals(two.importance)
    assert one.summary == two.summary
    assert all(torch.equal(value, two.student.state_dict()[name]) for name, value in one.student.state_dict().items())


def test_ratio_zero_is_a_copy():
    model = tiny_model("qwen2")
    result = prune(model, section(ratio=0.0), BATCHES, no_progress)
    assert result.summary["ratio_reached"] == 0
    assert not result.summary["compensated"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in result.student.state_dict().items())
    assert all(result.importance["kept"].to_pylist())


def test_compensation_can_be_left_out():
    model = tiny_model("llama")
    kwargs = {"structure": ("mlp",)}
    plain = prune(model, section(compensate=False, **kwargs), BATCHES, no_progress)
    fitted = prune(model, section(**kwargs), BATCHES, no_progress)
    assert plain.summary["refits"] == []
    differing = {n for n, v in plain.student.state_dict().items() if not torch.equal(v, fitted.student.state_dict()[n])}
    refitted = {refit["name"] for refit in fitted.summary["refits"]}
    assert refitted >= {f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")}
    # Both models read the same in the first block, and there are too few tokens to turn what reads in the others.
    assert differing == {f"{name}.weight" for name in refitted} - {"model.layers.0.self_attn.o_proj.weight"}


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_in_bfloat16(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    batches = batches_of(((20,) * 8,) * 2)
    result = prune(model, section(ratio=0.2), batches, no_progress)
    assert result.student.dtype == torch.bfloat16
    assert all(refit["error_after"] < refit["error_before"] for refit in result.summary["refits"])


def test_unreachable_ratio_is_a_recipe_error():
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match="largest reachable ratio"):
        prune(model, section(ratio=0.9, method="random", structure=("mlp",)), BATCHES, no_progress)


def test_a_student_of_another_class_is_the_same_in_a_fresh_process(tmp_path):
    # Of eight groups of three query heads five stay: fifteen heads do not divide d_model, so a Llama becomes a Mistral.
    model = tiny_model("llama", num_attention_heads=24, num_key_value_heads=8, head_dim=4)
    result = prune(model, section(ratio=0.25, structure=("heads",)), BATCHES, no_progress)
    assert result.summary["query_heads_after"] == 15
    result.student.save_pretrained(tmp_path)
    verified = verify_saved(tmp_path, torch.float32, torch.device("cpu"), result.cases)
    assert verified.architecture == result.summary["architecture"] == "MistralForCausalLM"
    assert verified.difference <= 1e-5
    assert verified.num_generated == 4
