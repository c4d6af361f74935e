import json

import pytest
import torch
from pruning_models import FAMILIES, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finescope.models.anatomy import anatomy_of, blocks_of
from finescope.pruning.files import StudentFiles


def written(model, directory, shard_bytes):
    files = StudentFiles(model, anatomy_of(model), directory, shard_bytes)
    for layer, block in enumerate(blocks_of(model, anatomy_of(model))):
        files.put(layer, block)
        assert all(value.is_meta for value in block.parameters())
    files.finish()


@pytest.mark.parametrize("shard_bytes", [1, 2**30])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_that_of_save_pretrained(family, shard_bytes, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "whole")
    written(model, tmp_path / "by_block", shard_bytes)
    whole, by_block = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "by_block"))
    if shard_bytes == 1:
        shards = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
        assert by_block == sorted([*set(whole) - {"model.safetensors"}, *shards, "model.safetensors.index.json"])
        index = json.loads((tmp_path / "by_block" / "model.safetensors.index.json").read_text())
        found = {}
        for shard in shards:
            tensors = load_file(tmp_path / "by_block" / shard)
            assert {index["weight_map"][name] for name in tensors} == {shard}
            assert not tensors.keys() & found.keys(), "tied weights once"
            found |= tensors
        assert found.keys() == index["weight_map"].keys()
    else:
        assert by_block == whole
        found = load_file(tmp_path / "by_block" / "model.safetensors")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "by_block" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_it_loads_strictly(tmp_path):
    model = tiny_model("mixtral", dtype=torch.bfloat16)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    written(model, tmp_path / "student", 1)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
