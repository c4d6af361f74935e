import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors_bytes import read_tensors, write_tensors
from tiny_dictionary import ARCHITECTURES, Reads, assert_same, tiny_dictionary
from torch import Tensor

from finescope import storage
from finescope.errors import DictionaryError
from finescope.models.hooks import HookPoint
from finescope.sae.autoencoder import Architecture, SparseAutoencoder
from finescope.sae.dictionary import load_dictionary
from finescope.sae.record import Dictionary
from finescope.sae.saelens import save_saelens

# Two inputs, three latents: z = [a0, a1, a0 + a1] of what is left after the pre-bias [1, 0], plus the bias [0, 1, -1].
WEIGHTS: dict[str, Any] = {
    "W_enc": [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]],
    "b_enc": [0.0, 1.0, -1.0],
    "W_dec": [[1.0, 0.0], [0.0, 2.0], [0.0, 0.5]],
    "b_dec": [1.0, 0.0],
}
CONFIG: dict[str, Any] = {
    "architecture": "standard",
    "d_in": 2,
    "d_sae": 3,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"sae_lens_version": "6.5.0", "model_name": "gpt2-small", "hook_name": "blocks.2.hook_resid_post"},
}
ACTIVATION = [[3.0, 4.0]]  # pre-activations [2, 5, 5]


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> str:
    """A folder in SAELens's layout; config keys that are None are left out."""
    write_tensors(folder / "sae_weights.safetensors", {**WEIGHTS, **(tensors or {})})
    full = {**CONFIG, **config}
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in full.items() if value is not None}))
    return str(folder)


def code(dictionary: Dictionary) -> list[float]:
    return dictionary.autoencoder.encode(torch.tensor(ACTIVATION)).tolist()[0]


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        ({}, {}, [2, 5, 5]),
        ({"apply_b_dec_to_input": False}, {}, [3, 5, 6]),
        ({"architecture": "topk", "k": 1}, {"b_enc": [0.0, 1.0, -2.0]}, [0, 5, 0]),
        # Times the decoder norms 1, 2 and 0.5 the third latent falls behind the first.
        ({"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}, {"b_enc": [1.0, 1.0, -1.0]}, [3, 10, 0]),
        ({"architecture": "jumprelu"}, {"threshold": [2.0, 4.9, 5.1]}, [0, 5, 0]),
        ({"architecture": "batchtopk", "k": 1.6}, {"topk_threshold": 4.0}, [0, 5, 5]),
        (
            {"architecture": "matryoshka_batchtopk", "k": 2, "rescale_acts_by_decoder_norm": True},
            {"topk_threshold": 4.0},
            [0, 10, 0],
        ),
    ],
)
def test_what_saelens_has_flags_for_is_folded(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], expected: list[float]
) -> None:
    found = load_dictionary(written(tmp_path / "sae", config, tensors))
    assert code(found) == expected
    assert (found.hook, found.model_path, found.module) == (HookPoint(3), "gpt2-small", "blocks.2.hook_resid_post")
    assert (found.fvu, found.model_fingerprint, found.moments_known) == (None, None, False)
    assert (found.autoencoder.mean.tolist(), found.autoencoder.scale.tolist()) == ([0, 0], [1, 1])
    assert found.coordinates_method == "all"


def test_reconstruction_is_the_same_whatever_is_folded(tmp_path: Path) -> None:
    plain = load_dictionary(written(tmp_path / "a", {}))
    assert plain.autoencoder(torch.tensor(ACTIVATION)).tolist() == [[2 * 1 + 1, 5 * 2 + 5 * 0.5]]
    scaled = load_dictionary(written(tmp_path / "b", {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}))
    assert scaled.autoencoder(torch.tensor(ACTIVATION)).tolist() == [[3.0, 12.5]]


def test_a_layout_older_than_version_6(tmp_path: Path) -> None:
    old = {
        "metadata": None,
        "architecture": None,
        "hook_point": "blocks.0.hook_mlp_out",
        "hook_point_head_index": None,
        "model_name": "pythia-70m",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 2},
        "normalize_activations": False,
    }
    found = load_dictionary(written(tmp_path / "sae", old, {"scaling_factor": [1.0, 1.0, 1.0]}))
    assert (found.hook, found.model_path) == (HookPoint(1, "mlp"), "pythia-70m")
    assert (found.autoencoder.architecture, found.autoencoder.k) == ("topk", 2)
    assert code(found) == [0, 5, 5]


def test_jumprelu_that_was_trained_as_batch_topk(tmp_path: Path) -> None:
    details = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 2.0}}
    config = {"architecture": "jumprelu", "metadata": {**CONFIG["metadata"], **details}}
    found = load_dictionary(written(tmp_path / "sae", config, {"threshold": [3.0, 3.0, 3.0]}))
    assert (found.autoencoder.architecture, found.autoencoder.k) == ("batch_topk", 2)
    assert code(found) == [0, 5, 5]


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"architecture": "gated"}, {}, r"cfg\.json: architecture: 'gated' is not known; expected one of topk, standard"),
        ({"activation_fn": "tanh-relu"}, {}, "activation_fn: 'tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, {}, "normalize_activations: 'layer_norm' cannot be read.*norm of each"),
        ({"normalize_activations": "constant_norm_rescale"}, {}, "'constant_norm_rescale' cannot be read"),
        ({"normalize_activations": True}, {}, "'expected_average_only_in' cannot be read.*factor is not in"),
        ({"normalize_activations": "covariance_whitening"}, {}, "matrix is not in"),
        ({"reshape_activations": "hook_z"}, {}, "reshape_activations: 'hook_z'"),
        ({"hook_head_index": 3}, {}, "hook_head_index"),
        ({"d_in": "2"}, {}, "d_in: expected a number above 0, found '2'"),
        ({"d_in": 3}, {}, r"sae_weights\.safetensors: tensor 'W_enc' is of shape \(2, 3\), expected \(3, 3\)"),
        ({"architecture": "topk"}, {}, "k: expected a number above 0, found None"),
        ({"architecture": "topk", "k": 4}, {}, r"k: 4, expected 1 to num_latents \(3\)"),
        ({"architecture": "jumprelu"}, {}, "tensor 'threshold' is missing"),
        ({}, {"W_skip": [1.0]}, "tensor 'W_skip' is not known"),
        ({}, {"scaling_factor": [1.0, 2.0, 1.0]}, "tensor 'scaling_factor' is not known"),
        ({"metadata": {"hook_name": "blocks.2.attn.hook_z"}}, {}, "hook point 'blocks.2.attn.hook_z' is not known"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, {}, "is not known"),
        ({"metadata": None}, {}, "hook_name: expected the name of a hook point, found None"),
        ({"metadata": {"finescope": {"record": {}}}}, {}, r"metadata\.finescope: record\.format_version"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(DictionaryError, match=message):
        load_dictionary(written(tmp_path / "sae", config, tensors))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    uri = written(tmp_path / "sae", {})
    (tmp_path / "sae" / "cfg.json").write_text("[]")
    with pytest.raises(DictionaryError, match=r"cfg\.json: expected a JSON object, found list"):
        load_dictionary(uri)
    (tmp_path / "sae" / "cfg.json").write_text("{")
    with pytest.raises(DictionaryError, match=r"cfg\.json is not JSON"):
        load_dictionary(uri)
    (tmp_path / "sae" / "cfg.json").unlink()
    with pytest.raises(DictionaryError, match=r"cfg\.json is missing"):
        load_dictionary(uri)
    written(tmp_path / "sae", {})
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"no")
    with pytest.raises(DictionaryError, match=r"sae_weights\.safetensors cannot be read"):
        load_dictionary(uri)


def small(architecture: Architecture, **tensors: Tensor) -> Dictionary:
    """Three latents on coordinates 1 and 3 of four."""
    weights = {
        "encoder_weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "encoder_bias": torch.tensor([0.5, -0.5, 0.0]),
        "decoder_weight": torch.tensor([[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]),
        "decoder_bias": torch.tensor([13.0, 14.0]),
        "coordinates": torch.tensor([1, 3]),
        "mean": torch.tensor([0.25, 0.5]),
        "scale": torch.tensor([2.0, 4.0]),
    }
    autoencoder = SparseAutoencoder({**weights, **tensors}, architecture=architecture, k=2, d_in=4)
    return Dictionary(autoencoder, HookPoint(10), "jacobian", "org/model", None, "f", "model.layers.9", 0.5)


def test_what_is_written(tmp_path: Path) -> None:
    to = tmp_path / "deep" / "sae"
    assert save_saelens(str(to), small("topk")) == str(to)
    assert sorted(file.name for file in to.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert [file.name for file in to.parent.iterdir()] == ["sae"]
    assert read_tensors(to / "sae_weights.safetensors") == {
        "W_enc": ([4, 3], [0, 0, 0, 1, 3, 5, 0, 0, 0, 2, 4, 6]),
        "b_enc": ([3], [0.5, -0.5, 0]),
        "W_dec": ([3, 4], [0, 7, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12]),
        "b_dec": ([4], [0, 13, 0, 14]),
    }
    config = json.loads((to / "cfg.json").read_text())
    kept = config["metadata"].pop("finescope")
    assert config == {
        "architecture": "topk",
        "d_in": 4,
        "d_sae": 3,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "k": 2,
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": "6.0.0",
            "sae_lens_training_version": None,
            "model_name": "org/model",
            "hook_name": "blocks.9.hook_resid_post",
        },
    }
    assert (kept["mean"], kept["scale"], kept["basis"]) == ([0.25, 0.5], [2, 4], None)
    assert (kept["record"]["coordinates"], kept["record"]["fvu"], kept["record"]["site"]) == ([1, 3], 0.5, "residual")


def test_batch_topk_is_written_as_jumprelu(tmp_path: Path) -> None:
    save_saelens(str(tmp_path / "sae"), small("batch_topk", threshold=torch.tensor([1.5, 1.5, 1.5])))
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert read_tensors(tmp_path / "sae" / "sae_weights.safetensors")["threshold"] == ([3], [1.5, 1.5, 1.5])
    assert load_dictionary(str(tmp_path / "sae")).autoencoder.architecture == "batch_topk"


@pytest.mark.parametrize("reads", ["all", "some", "pca"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back(architecture: Architecture, reads: Reads) -> None:
    uri = f"memory://saelens-{architecture}-{reads}"
    before = tiny_dictionary(architecture, reads, HookPoint(10, "mlp_hidden"))
    save_saelens(uri, before)
    assert storage.read_json(f"{uri}/cfg.json")["metadata"]["hook_name"] == "blocks.9.mlp.hook_post"
    assert_same(load_dictionary(uri), before)


@pytest.mark.parametrize("reads", ["some", "pca"])
def test_weights_that_another_tool_changed_are_not_taken_for_ours(tmp_path: Path, reads: Reads) -> None:
    save_saelens(str(tmp_path / "sae"), tiny_dictionary("topk", reads))
    path = tmp_path / "sae" / "sae_weights.safetensors"
    tensors: dict[str, Any] = {}
    for name, (shape, numbers) in read_tensors(path).items():
        rows = torch.tensor(numbers).reshape(shape)
        tensors[name] = (rows + 0.1 if name == "W_dec" else rows).tolist()
    write_tensors(path, tensors)
    with pytest.raises(DictionaryError, match=r"metadata\.finescope: the weights read more coordinates than it says"):
        load_dictionary(str(tmp_path / "sae"))
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    del config["metadata"]["finescope"]
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    assert load_dictionary(str(tmp_path / "sae")).coordinates_method == "all"


def test_a_changed_k_is_a_contradiction(tmp_path: Path) -> None:
    save_saelens(str(tmp_path / "sae"), tiny_dictionary())
    file = tmp_path / "sae" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"k": 3}))
    with pytest.raises(DictionaryError, match=r"architecture topk, k 3; metadata\.finescope says topk, k 8"):
        load_dictionary(str(tmp_path / "sae"))
