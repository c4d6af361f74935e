import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors_bytes import read_tensors, write_tensors
from test_sae_saelens import small
from tiny_dictionary import Reads, assert_same, tiny_dictionary

from finescope.errors import DictionaryError
from finescope.models.hooks import HookPoint
from finescope.sae.dictionary import load_dictionary
from finescope.sae.sparsify import save_sparsify

# Pre-activations of [3, 4]: [2, 5, 5] less what the bias says.
WEIGHTS: dict[str, Any] = {
    "encoder.weight": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
    "encoder.bias": [0.0, 1.0, -2.0],
    "W_dec": [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]],
    "b_dec": [1.0, 0.0],
}
CONFIG: dict[str, Any] = {"activation": "topk", "expansion_factor": 32, "num_latents": 3, "k": 2, "d_in": 2, "transcode": False}


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> str:
    write_tensors(folder / "sae.safetensors", {**WEIGHTS, **(tensors or {})})
    (folder / "cfg.json").write_text(json.dumps({**CONFIG, **config}))
    return str(folder)


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("layers.2", HookPoint(3)),
        ("layers_2", HookPoint(3)),
        ("model.layers.2", HookPoint(3)),
        ("layers.2.mlp", HookPoint(3, "mlp")),
        ("h.0.attn", HookPoint(1, "attention")),
        ("layers.2/seed1", HookPoint(3)),
    ],
)
def test_reading_by_hand(tmp_path: Path, folder: str, hook: HookPoint) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "org/m", "revision": "main", "batch_size": 8}))
    found = load_dictionary(written(tmp_path / "run" / folder, {}))
    assert found.autoencoder.encode(torch.tensor([[3.0, 4.0]])).tolist() == [[0, 5, 4]]
    assert found.autoencoder(torch.tensor([[3.0, 4.0]])).tolist()[0] == pytest.approx([1 + 4 * 0.6, 5 + 4 * 0.8])
    assert (found.hook, found.model_path, found.model_revision) == (hook, "org/m", "main")
    assert (found.fvu, found.moments_known, found.coordinates_method) == (None, False, "all")


def test_the_model_is_unknown_where_no_run_tells(tmp_path: Path) -> None:
    assert load_dictionary(written(tmp_path / "layers.2", {})).model_path == "unknown"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"activation": "groupmax"}, {}, r"cfg\.json: activation: 'groupmax' cannot be read, expected 'topk'"),
        ({"transcode": True}, {}, "transcode: True cannot be read"),
        ({"skip_connection": True}, {}, "skip_connection"),
        ({"signed": True}, {}, "signed"),
        ({"k": None}, {}, "k: expected a whole number above 0, found None"),
        ({"k": 4}, {}, "k: 4, expected 1 to num_latents"),
        ({"d_in": None}, {}, "d_in: expected a whole number above 0"),
        ({"num_latents": 0}, {}, r"sae\.safetensors: tensor 'encoder.weight' is of shape \(3, 2\), expected \(64, 2\)"),
        ({"num_latents": 0, "expansion_factor": None}, {}, "expansion_factor"),
        ({}, {"W_skip": [[1.0]]}, "tensor 'W_skip' is not known"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(DictionaryError, match=message):
        load_dictionary(written(tmp_path / "layers.2", config, tensors))


@pytest.mark.parametrize("folder", ["sae", "embed_tokens", "layers.2.input_layernorm", "vision_tower.layers.2"])
def test_a_folder_must_be_named_by_a_hook_point(tmp_path: Path, folder: str) -> None:
    with pytest.raises(DictionaryError, match=f"its folder: hook point '{folder}' is not known; expected"):
        load_dictionary(written(tmp_path / folder, {}))


def test_what_is_written(tmp_path: Path) -> None:
    where = save_sparsify(str(tmp_path / "run"), small("topk"))
    assert where == str(tmp_path / "run" / "layers.9")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["config.json", "layers.9"]
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert read_tensors(Path(where) / "sae.safetensors") == {
        "encoder.weight": ([3, 4], [0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6]),
        "encoder.bias": ([3], [0.5, -0.5, 0]),
        "W_dec": ([3, 4], [0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12]),
        "b_dec": ([4], [0, 13, 0, 14]),
    }
    assert json.loads((Path(where) / "finescope.json").read_text())["record"]["coordinates"] == [1, 3]
    assert json.loads((Path(where) / "cfg.json").read_text()) == {
        "activation": "topk",
        "expansion_factor": 1,
        "normalize_decoder": False,
        "num_latents": 3,
        "k": 2,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": 4,
    }


@pytest.mark.parametrize("reads", ["all", "some", "pca"])
@pytest.mark.parametrize("remote", [False, True])
def test_there_and_back(tmp_path: Path, reads: Reads, remote: bool) -> None:
    before = tiny_dictionary("topk", reads, HookPoint(10, "attention"))
    where = save_sparsify(f"memory://sparsify-{reads}" if remote else str(tmp_path / "run"), before)
    assert where.endswith("/layers.9.self_attn.o_proj")
    assert_same(load_dictionary(where), before)


def test_what_sparsify_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=r"topk dictionaries only, this one is jumprelu; .*sae-lens"):
        save_sparsify(str(tmp_path / "run"), tiny_dictionary("jumprelu"))
    with pytest.raises(DictionaryError, match="site mlp_hidden, the input of one"):
        save_sparsify(str(tmp_path / "run"), tiny_dictionary("topk", "all", HookPoint(10, "mlp_hidden")))
    assert list(tmp_path.iterdir()) == []
