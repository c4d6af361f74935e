import re
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, saved_model, saved_multimodal_model, tiny_model
from torch import nn

from finescope.config import ModelSection
from finescope.distillation.losses import Mixture
from finescope.distillation.student import load_student
from finescope.errors import ModelError
from finescope.models import anatomy as module
from finescope.models.anatomy import anatomy_of, block_parameters, blocks_of
from finescope.models.describe import describe

# The linear maps that all blocks of a family have.
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEARS = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc", "c_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "mixtral": LLAMA[:4],
    "qwen3_moe": LLAMA[:4],
}


def test_the_table_is_what_these_tests_cover() -> None:
    assert tuple(module.FAMILIES) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_where_the_table_says(family: str) -> None:
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    assert model.get_submodule(anatomy.embedding) is model.get_input_embeddings()
    assert model.get_submodule(anatomy.decoder) is model.base_model
    assert len(blocks_of(model, anatomy)) == 4
    # The final norm is the last child of the decoder that has weights.
    assert [c for c in model.base_model.children() if any(True for _ in c.parameters())][-1] is model.get_submodule(
        anatomy.final_norm
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_maps_of_a_block_are_called_in_the_tables_order(family: str) -> None:
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    called: list[tuple[int, str]] = []
    names = [(layer, name) for layer, b in enumerate(blocks_of(model, anatomy)) for name in module.linears_of(b, anatomy)]
    for layer, name in names:
        linear = model.get_submodule(f"{anatomy.blocks}.{layer}.{name}")
        linear.register_forward_hook(lambda *_, place=(layer, name): called.append(place))
    model(torch.arange(1, 7)[None])
    assert called == names


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_the_linear_maps_of_the_blocks(tmp_path: Path, family: str) -> None:
    student = load_student(saved_model(tmp_path, family), "lora", 2, 0, Mixture(0.0), recompute=False)
    adapted = [name.split(".lora_A")[0] for name, _ in student.named_parameters() if "lora_A" in name]
    for layer in range(4):
        found = [name.rpartition(".")[2] for name in adapted if re.search(rf"\.{layer}\.", name)]
        assert sorted(found) == sorted(LINEARS.get(family, LLAMA))
    assert all(re.search(r"\.[0-3]\.", name) for name in adapted), "no head, no embedding"


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_and_missing_modules_are_named(family: str) -> None:
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    block, name = blocks_of(model, anatomy)[2], re.escape(f"{anatomy.blocks}.2.")
    block.add_module("adapter", nn.Linear(2, 2))
    with pytest.raises(ModelError, match=rf"'{name}adapter' \(Linear\) of family '{family}' is not recognised"):
        anatomy_of(model)
    block.add_module("adapter", None)
    anatomy_of(model)
    parent, _, child = anatomy.output.rpartition(".")
    setattr(block.get_submodule(parent), child, nn.Identity())
    with pytest.raises(ModelError, match=rf"'{name}{re.escape(anatomy.output)}' .*is not a linear layer"):
        anatomy_of(model)
    delattr(block.get_submodule(parent), child)
    with pytest.raises(ModelError, match=rf"'{name}{re.escape(anatomy.output)}', expected in family '{family}', is missing"):
        anatomy_of(model)


def test_weights_beside_the_modules_are_not_overlooked() -> None:
    model = tiny_model("mixtral")
    model.get_submodule("model.layers.1.mlp").register_parameter("scale", nn.Parameter(torch.ones(2)))
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp' \(MixtralSparseMoeBlock\) of family 'mixtral'"):
        anatomy_of(model)


def test_unknown_family_names_the_modules_of_its_block(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=16)).save_pretrained(tmp_path)
    message = r"'bloom'.*known families: llama, .*transformer\.h\.0 = BloomBlock\(.*self_attention\.query_key_value"
    with pytest.raises(ModelError, match=message):
        describe(ModelSection(path=str(tmp_path)))


@pytest.mark.parametrize("family", FAMILIES)
def test_describe_tells_sites_and_what_can_be_pruned(tmp_path: Path, family: str) -> None:
    told = describe(ModelSection(path=str(saved_model(tmp_path, family))))
    model = tiny_model(family)
    assert (told["family"], told["blocks"], told["d_model"], told["heads"], told["vocab_size"]) == (family, 4, 16, 4, 64)
    assert told["head_dim"] == 4
    assert told["key_value_heads"] == (4 if family in ("gpt2", "gpt_neox") else 2)
    mlp_width = {"gpt2": 64, "qwen3_moe": 12}.get(family, 24)
    assert told["mlp_width"] == mlp_width
    assert told["block_parameters"] == block_parameters(model, anatomy_of(model)) == sum(told["modules"].values())
    rows = {row["site"]: row for row in told["sites"]}
    hidden = {"mixtral": None, "qwen3_moe": (24, "3")}.get(family, (mlp_width, "1-4"))
    assert ((row := rows.get("mlp_hidden")) and (row["width"], row["layers"])) == hidden
    for site in ("residual", "attention", "mlp"):
        assert (rows[site]["width"], rows[site]["layers"], rows[site]["reads"]) == (16, "1-4", "output")
    for row in rows.values():
        model.get_submodule(row["module"].replace(".N", ".2"))
    assert told["not_prunable"].keys() == ({"heads"} if family in ("gpt2", "gpt_neox") else set())
    norms = sum(count for name, count in told["modules"].items() if "norm" in name and family != "olmo2")
    whole = told["block_parameters"] - norms
    if family in ("gpt2", "gpt_neox"):
        assert told["prune"] == "mlp"
        assert len(told["not_prunable"]["heads"]) <= 60, "a table's cell holds no more"
        assert told["prunable"] == {"mlp": 4 * mlp_width * (2 * 16 + 1)}  # of the biases those of the first map
    elif family in ("mixtral", "qwen3_moe"):
        assert told["prune"] == "heads, mlp, experts"
        dense = 3 * 16 * 24 if family == "qwen3_moe" else 0
        assert told["prunable"]["heads"] + told["prunable"]["experts"] + dense == whole
        assert (
            told["prunable"]["mlp"] == sum(1 - bool(dense and layer == 2) for layer in range(4)) * 4 * 3 * 16 * mlp_width + dense
        )
    else:
        assert told["prune"] == "heads, mlp"
        stream = 4 * 2 * 16 if family == "olmo2" else 0  # its norms over all heads leave with them
        assert sum(told["prunable"].values()) + stream == whole
        assert told["prunable"]["mlp"] == 4 * 3 * 16 * 24


def test_describe_of_a_multimodal_model_tells_of_its_text_model(tmp_path: Path) -> None:
    told = describe(ModelSection(path=str(saved_multimodal_model(tmp_path))))
    assert (told["family"], told["blocks"], told["d_model"]) == ("gemma3_text", 4, 16)
    assert told["parameters"] == tiny_model("gemma3_text").num_parameters()
