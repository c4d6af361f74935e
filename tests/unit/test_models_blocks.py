import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, reference, saved_model, saved_multimodal_model

from finescope.errors import ModelError
from finescope.models.anatomy import blocks_of
from finescope.models.blocks import BlocksInMemory, BlocksOnDisk, open_blocks
from finescope.models.load import load_model


def assert_same(source, whole):
    """Block by block the weights of the whole model; beside the blocks its very values; nothing of a block after its turn."""
    assert not source.model.training
    for layer, expected in enumerate(blocks_of(whole, source.anatomy)):
        with source.block(layer) as block:
            found = dict(block.named_parameters())
            assert found.keys() == dict(expected.named_parameters()).keys()
            for name, value in expected.named_parameters():
                assert torch.equal(found[name], value)
                assert (found[name].dtype, found[name].requires_grad) == (value.dtype, False)
        assert all(value.is_meta for value in block.parameters())
    of_block = f"{source.anatomy.blocks}."
    for name, value in whole.named_parameters():
        if not name.startswith(of_block):
            assert torch.equal(source.model.get_parameter(name), value)
    for name, value in whole.named_buffers():
        assert torch.equal(source.model.get_buffer(name), value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_from_disk_are_those_of_the_whole_model(family, dtype, tmp_path):
    made = reference(saved_model(tmp_path, family), dtype=dtype)
    with open_blocks(made, "cpu") as source:
        assert isinstance(source, BlocksOnDisk)
        assert_same(source, load_model(made, device="cpu"))


def test_of_several_files(tmp_path):
    tiny_models.tiny_model("mixtral").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    made = reference(tmp_path)
    with open_blocks(made, "cpu") as source:
        assert_same(source, load_model(made, device="cpu"))


def test_of_a_text_model_in_a_multimodal_checkpoint(tmp_path):
    made = reference(saved_multimodal_model(tmp_path))
    with open_blocks(made, "cpu") as source:
        assert_same(source, load_model(made, device="cpu"))


def test_the_generation_config_and_ties_are_the_checkpoint_s(tmp_path):
    model = tiny_models.tiny_model("qwen2", tie_word_embeddings=True)
    model.generation_config.update(do_sample=True, temperature=0.7)
    model.save_pretrained(tmp_path)
    with open_blocks(reference(tmp_path), "cpu") as source:
        assert source.model.generation_config.temperature == 0.7
        assert source.model.get_output_embeddings().weight is source.model.get_input_embeddings().weight


def test_pickles_are_read_whole(tmp_path):
    directory = saved_model(tmp_path, "llama")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with open_blocks(reference(directory, allow_pickle=True), "cpu") as source:
        assert isinstance(source, BlocksInMemory)
        with source.block(1) as block:
            assert not any(value.is_meta for value in block.parameters())


@pytest.mark.parametrize("defect", ["missing", "of another shape", "unexpected"])
def test_a_block_that_does_not_fit_is_refused(defect, tmp_path):
    directory = saved_model(tmp_path, "llama")
    state, name = load_file(directory / "model.safetensors"), "model.layers.2.mlp.up_proj.weight"
    weight = state.pop(name)
    if defect != "missing":
        state |= {name: weight[:-1].clone()} if defect == "of another shape" else {name: weight, f"{name}_scale": weight.clone()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with open_blocks(reference(directory), "cpu") as source:
        with source.block(1):
            pass
        with pytest.raises(ModelError, match=rf"1 weights are {defect}, among them 'model\.layers\.2\.mlp\.up_proj"):
            source.block(2).__enter__()
