import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pruning_models import tiny_model
from safetensors.torch import load_file, save_file

from finescope.errors import StepFailed
from finescope.models.anatomy import anatomy_of, blocks_of
from finescope.pruning import reload_check, verify
from finescope.pruning.probe import Probe
from finescope.pruning.reload_check import compare
from finescope.pruning.verify import verify_saved

CPU = torch.device("cpu")


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


def cases_of(model):
    """What a model computes, by its blocks one after the other."""
    probe = Probe(model, anatomy_of(model))
    for layer, block in enumerate(blocks_of(model, anatomy_of(model))):
        probe.advance(layer, block)
    return probe.cases()


def verified(directory, model):
    return verify_saved(directory, model.dtype, CPU, cases_of(model))


@pytest.mark.usefixtures("in_this_process")
def test_a_faithful_directory_passes(saved):
    model, directory = saved
    found = verified(directory, model)
    assert found.architecture == "Qwen2ForCausalLM"
    assert found.difference <= 1e-5
    assert found.cached <= 1e-5
    assert found.num_generated == 4


@pytest.mark.usefixtures("in_this_process")
def test_another_weight_is_found_with_numbers(saved):
    model, directory = saved
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.1
    with pytest.raises(StepFailed, match=r"logits differ by .* of the largest"):
        verified(directory, model)


@pytest.mark.usefixtures("in_this_process")
def test_a_missing_weight_is_found(saved):
    model, directory = saved
    state = load_file(directory / "model.safetensors")
    state.pop("model.layers.1.self_attn.k_proj.bias")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepFailed, match=r"do not fit .*layers\.1\.self_attn\.k_proj\.bias"):
        verified(directory, model)


def test_a_directory_that_does_not_load_shows_the_error(saved):
    model, directory = saved
    (directory / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(StepFailed, match=r"fresh process could not load it \(exit 1\)"):
        verified(directory, model)


def test_pickles_and_foreign_code_are_refused(saved):
    model, directory = saved
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(StepFailed, match=r"safetensors and nothing else, found pytorch_model\.bin"):
        verified(directory, model)
    (directory / "pytorch_model.bin").unlink()
    config = json.loads((directory / "config.json").read_text())
    for change in ({"architectures": ["MyForCausalLM"]}, {"architectures": None}, {"auto_map": {}}):
        (directory / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(StepFailed, match="is not one class of transformers"):
            verified(directory, model)


def test_the_fresh_process_has_nothing_of_finescope():
    source = Path(reload_check.__file__).read_text(encoding="utf-8")
    imported = {name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", source, re.MULTILINE)}
    assert imported == {"io", "json", "sys", "tempfile", "typing", "numpy", "torch", "transformers"}


@pytest.mark.usefixtures("in_this_process")
def test_another_dtype_or_vocabulary_is_found(saved):
    model, directory = saved
    model.to(torch.bfloat16)
    with pytest.raises(StepFailed, match=r"loaded as Qwen2ForCausalLM torch\.float32, expected Qwen2ForCausalLM torch\.bfloat16"):
        verified(directory, model)
    other = tiny_model("qwen2", vocab_size=50)
    with pytest.raises(StepFailed, match="logits over 61 tokens after reloading, 50 in memory"):
        verified(directory, other)


def test_the_cases_are_what_the_model_computes():
    model = tiny_model("gemma2")
    one, long, pair = cases_of(model)
    assert one.input_ids.shape == (1, 1)
    assert long.input_ids.shape == (1, 64), "as many as the model takes"
    assert pair.attention_mask.sum(axis=1).tolist() == [32, 20]
    for case in (one, long, pair):
        ids, mask = torch.from_numpy(case.input_ids), torch.from_numpy(case.attention_mask)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -case.logits.shape[1] :]
        last = mask[:, -case.logits.shape[1] :].bool()
        torch.testing.assert_close(torch.from_numpy(case.logits)[last], logits[last], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("in_this_process")
def test_a_cache_that_is_not_used_is_found(saved, monkeypatch):
    model, directory = saved
    decoded = reload_check._decoded

    def forgetful(*arguments):
        return np.roll(decoded(*arguments), 1, axis=0)

    monkeypatch.setattr(reload_check, "_decoded", forgetful)
    with pytest.raises(StepFailed, match="decoded behind a cache, logits differ by"):
        verified(directory, model)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_that_memory_cannot_hold_stays_on_disk(family, tmp_path, monkeypatch):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(verify, "available_memory", lambda: verify._PROCESS + 60_000)
    limit = verify._memory_limit(tmp_path, CPU)
    assert 0 < limit < sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    found = verified(tmp_path, model)
    assert found.difference <= 1e-5
    assert found.num_generated == 4
