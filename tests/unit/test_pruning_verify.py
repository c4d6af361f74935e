import json
import re
from pathlib import Path

import pytest
import torch
from pruning_models import batches_of, tiny_model
from safetensors.torch import load_file, save_file

from finescope.errors import StepFailed
from finescope.pruning import reload_check, verify
from finescope.pruning.reload_check import compare
from finescope.pruning.verify import verify_saved

(IDS, _), *_ = batches_of(((8, 8),))


@pytest.fixture
def saved(tmp_path):
    """A tiny model and its directory."""
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """The fresh process's script without the process: seconds of imports saved where they are not what is tested."""
    monkeypatch.setattr(verify, "_in_fresh_process", lambda directory, *rest: compare(str(directory), *rest))


@pytest.mark.usefixtures("in_this_process")
def test_a_faithful_directory_passes(saved):
    model, directory = saved
    verified = verify_saved(directory, model, IDS)
    assert verified.architecture == "Qwen2ForCausalLM"
    assert verified.difference <= 1e-5
    assert verified.num_generated == 4


@pytest.mark.usefixtures("in_this_process")
def test_another_weight_is_found_with_numbers(saved):
    model, directory = saved
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.1
    with pytest.raises(StepFailed, match=r"logits differ by .* of the largest"):
        verify_saved(directory, model, IDS)


@pytest.mark.usefixtures("in_this_process")
def test_a_missing_weight_is_found(saved):
    model, directory = saved
    state = load_file(directory / "model.safetensors")
    state.pop("model.layers.1.self_attn.k_proj.bias")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepFailed, match=r"do not fit .*layers\.1\.self_attn\.k_proj\.bias"):
        verify_saved(directory, model, IDS)


def test_a_directory_that_does_not_load_shows_the_error(saved):
    model, directory = saved
    (directory / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(StepFailed, match=r"fresh process could not load it \(exit 1\)"):
        verify_saved(directory, model, IDS)


def test_pickles_and_foreign_code_are_refused(saved):
    model, directory = saved
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(StepFailed, match=r"safetensors and nothing else, found pytorch_model\.bin"):
        verify_saved(directory, model, IDS)
    (directory / "pytorch_model.bin").unlink()
    config = json.loads((directory / "config.json").read_text())
    for change in ({"architectures": ["MyForCausalLM"]}, {"architectures": None}, {"auto_map": {}}):
        (directory / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(StepFailed, match="is not one class of transformers"):
            verify_saved(directory, model, IDS)


def test_the_fresh_process_has_nothing_of_finescope():
    source = Path(reload_check.__file__).read_text(encoding="utf-8")
    imported = {name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", source, re.MULTILINE)}
    assert imported == {"io", "json", "sys", "typing", "numpy", "torch", "transformers"}


@pytest.mark.usefixtures("in_this_process")
def test_another_dtype_or_vocabulary_is_found(saved):
    model, directory = saved
    model.to(torch.bfloat16)
    with pytest.raises(StepFailed, match=r"loaded as Qwen2ForCausalLM torch\.float32, expected Qwen2ForCausalLM torch\.bfloat16"):
        verify_saved(directory, model, IDS)
    other = tiny_model("qwen2", vocab_size=70)
    with pytest.raises(StepFailed, match=r"shape \[2, 8, 61\] after reloading, \[2, 8, 70\]"):
        verify_saved(directory, other, IDS)
