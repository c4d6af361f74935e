"""The contract's table of bad input: models and machines. Exit code, message, and what is left on disk."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from bad_inputs import Case, refused
from cli_runs import finescope, states
from safetensors.torch import load_file
from tiny_run import write_inputs
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from finescope import plan, storage

_HINT = "finescope: `finescope check-model MODEL` shows what is recognised"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), documents=80)


@pytest.fixture
def model(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, for a test to spoil."""
    return Path(shutil.copytree(inputs / "model", tmp_path / "model"))


@pytest.mark.parametrize("command", ["run", "plan"])
def test_an_unknown_architecture(inputs: Path, tmp_path: Path, command: str) -> None:
    path = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=50)).save_pretrained(path)
    case = Case(inputs, tmp_path, model={"path": str(path)})
    ended = case.run(command=command)
    said = ("model family 'bloom' (BloomForCausalLM) is not recognised", "transformer.h.0", "self_attention.query_key_value")
    refused(ended, *said)
    assert ended.errors[1:] == [_HINT]
    assert not case.output.exists()
    checked = finescope("check-model", str(path))
    refused(checked, *said)
    assert checked.errors[0] == ended.errors[0]


def test_groups_that_a_family_cannot_lose_are_refused_before_the_dear_steps(inputs: Path, tmp_path: Path, model: Path) -> None:
    words = json.loads((model / "config.json").read_text())["vocab_size"]
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 512, "vocab_size": words, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=2, pad_token_id=1)).save_pretrained(model)
    case = Case(inputs, tmp_path, model={"path": str(model)}, prune={"structure": ["heads", "mlp"]})
    ended = case.run()
    refused(ended, "prune.structure: no heads can be removed from this model: GPT-2 takes n_embd / n_head", "a list of mlp")
    assert states(case.output) == {"index": "done", "model": "done"}
    checked = finescope("check-model", str(model))
    assert "heads GPT-2 takes n_embd / n_head for the size of a head" in " ".join(checked.out.split())
    assert "transformer.h.N.attn.c_proj" in checked.out


def test_blocks_that_cannot_leave_are_refused_before_the_dear_steps(inputs: Path, tmp_path: Path, model: Path) -> None:
    words = json.loads((model / "config.json").read_text())["vocab_size"]
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 512, "vocab_size": words}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=2, pad_token_id=1, scale_attn_by_inverse_layer_idx=True)
    GPT2LMHeadModel(config).save_pretrained(model)
    case = Case(inputs, tmp_path, model={"path": str(model)}, prune={"structure": ["blocks"]})
    refused(case.run(), "prune.structure: no blocks can be removed", "scale_attn_by_inverse_layer_idx", "a list without blocks")
    assert states(case.output) == {"index": "done", "model": "done"}


def test_check_model_tells_of_a_known_architecture(inputs: Path) -> None:
    checked = finescope("check-model", str(inputs / "model"), "--json")
    assert checked.code == 0, checked.err
    found = json.loads(checked.out)
    assert (found["family"], found["blocks"], found["key_value_heads"]) == ("llama", 3, 2)
    assert found["prunable"]["heads"] + found["prunable"]["mlp"] <= found["block_parameters"] < found["parameters"]


def test_a_model_that_is_not_there(inputs: Path, tmp_path: Path) -> None:
    case = Case(inputs, tmp_path, model={"path": str(tmp_path / "none")})
    refused(case.run(), f"model.path '{tmp_path}/none': no such directory")
    assert not case.output.exists()


def test_a_teacher_that_is_not_there(inputs: Path, tmp_path: Path) -> None:
    case = Case(inputs, tmp_path, distill={"teacher": str(tmp_path / "none")})
    refused(case.run(), f"distill.teacher '{tmp_path}/none': no such directory")
    assert not case.output.exists()


def test_a_teacher_of_other_tokens_is_refused_before_the_dear_steps(inputs: Path, tmp_path: Path, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["salt"], words["onion"] = words["onion"], words["salt"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    case = Case(inputs, tmp_path, distill={"teacher": str(model), "kl_weight": 0.5})
    said = f"distill.teacher: '{model}' has another vocabulary ({len(words)} tokens) than the model ({len(words)})"
    refused(case.run(), said, f"first at id {min(words['salt'], words['onion'])}", "with kl_weight")
    assert states(case.output) == {"index": "done", "model": "done"}
    rewriting = case.run("--until", "sae", "--set", "distill.kl_weight=0")
    assert rewriting.code == 0, rewriting.err


def test_more_tokens_than_the_vocabulary_has(inputs: Path, tmp_path: Path) -> None:
    case = Case(inputs, tmp_path, distill={"kl_weight": 0.5, "kl_top_k": 10_000})
    refused(case.run(), "distill.kl_top_k: expected at most")
    assert states(case.output) == {"index": "done", "model": "done"}


def test_a_layer_beyond_the_model_s(inputs: Path, tmp_path: Path) -> None:
    case = Case(inputs, tmp_path, sae={"layer": 4})
    refused(case.run(), "sae.layer: 4 is beyond the 3 blocks of")
    assert not (case.output / "sae").exists()


def test_pickle_weights_are_refused_unless_the_recipe_names_them(inputs: Path, tmp_path: Path, model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    case = Case(inputs, tmp_path, model={"path": str(model)})
    refused(case.run(), "has pickle weights only (pytorch_model.bin)", "set model.allow_pickle: true in the recipe")
    assert not case.output.exists()
    allowed = case.run("--until", "sae", "--set", "model.allow_pickle=true")
    assert allowed.code == 0, allowed.err
    assert states(case.output)["sae"] == "done"


def test_remote_code_is_refused_unless_the_recipe_names_it(inputs: Path, tmp_path: Path, model: Path) -> None:
    ran = tmp_path / "ran"
    (model / "configuration_ours.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OurConfig(LlamaConfig):\n    pass\n"
    )
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_ours.OurConfig"}
    (model / "config.json").write_text(json.dumps(config))
    case = Case(inputs, tmp_path, model={"path": str(model)})
    refused(case.run(), "brings its own Python code", "set model.trust_remote_code: true in the recipe")
    refused(finescope("check-model", str(model)), "brings its own Python code")
    assert not ran.exists()
    assert not case.output.exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_not_enough_disk(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda uri: 1_000)
    case = Case(inputs, tmp_path)
    refused(case.run(command=command), f"output: '{case.output}' has 0.00 GB free; the plan needs about", "`finescope plan`")
    assert not case.output.exists()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_not_enough_memory(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: 10_000_000)
    case = Case(inputs, tmp_path)
    refused(case.run(command=command), "step '", "of memory; 0.01 GB are available", "`finescope plan`")
    assert not case.output.exists()


def test_a_machine_is_not_asked_where_nothing_is_left_to_do(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(inputs, tmp_path)
    assert case.run("--until", "model").code == 0
    monkeypatch.setattr(plan, "available_memory", lambda: 10_000_000)
    again = case.run("--until", "model")
    assert again.code == 0, again.err
    refused(case.run("--until", "sae"), "of memory; 0.01 GB are available")
    assert states(case.output) == {"index": "done", "model": "done"}


def test_a_corpus_file_that_changed_after_the_index(inputs: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(inputs / "corpus", tmp_path / "corpus"))
    case = Case(inputs, tmp_path, corpus={"path": str(corpus)})
    assert case.run("--until", "model").code == 0
    os.utime(corpus / "part-1.parquet", (1, 1))
    refused(case.run("--until", "sae"), f"'{corpus}/part-1.parquet' has changed since the corpus was indexed")
    assert states(case.output) == {"index": "done", "model": "done", "sae": "failed"}


def test_verbose_shows_the_traceback(inputs: Path, tmp_path: Path) -> None:
    case = Case(inputs, tmp_path, model={"path": str(tmp_path / "none")})
    ended = case.run("--verbose")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.errors[0].startswith("finescope: model.path")
