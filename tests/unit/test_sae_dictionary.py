import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sae_autoencoder import activations, autoencoder
from tiny_models import reference, saved_model

from finescope.config import SaeSection
from finescope.errors import ModelError, StepFailed
from finescope.models.hooks import HookPoint
from finescope.sae.autoencoder import Architecture
from finescope.sae.dictionary import Dictionary, check_belongs, load_dictionary, save_dictionary
from finescope.sae.stream import TokenBatch
from finescope.sae.train import adopt_dictionary, measure_fvu, train_dictionary


def dictionary(architecture: Architecture = "topk") -> Dictionary:
    return Dictionary(autoencoder(architecture), HookPoint(2), "jacobian", "/models/m", None, "f" * 64, 0.25)


def documents(count: int = 40) -> list[TokenBatch]:
    generator = np.random.default_rng(0)
    ids = generator.integers(1, 64, (count, 12))
    mask = np.ones_like(ids)
    mask[::3, 8:] = 0
    return [(ids[at : at + 8], mask[at : at + 8]) for at in range(0, count, 8)]


@pytest.mark.parametrize("architecture", ["topk", "relu_l1"])
@pytest.mark.parametrize("remote", [False, True])
def test_round_trip(tmp_path: Path, architecture: Architecture, remote: bool) -> None:
    uri = f"memory://dictionary-{architecture}" if remote else str(tmp_path / "sae")
    before = dictionary(architecture)
    save_dictionary(uri, before)
    after = load_dictionary(uri)
    assert torch.equal(after.autoencoder.encode(activations()), before.autoencoder.encode(activations()))
    assert torch.equal(after.autoencoder(activations()), before.autoencoder(activations()))
    for name in ("hook", "layer", "coordinates_method", "model_path", "model_revision", "model_fingerprint", "fvu"):
        assert getattr(after, name) == getattr(before, name), name
    assert (after.autoencoder.k, after.autoencoder.architecture, after.autoencoder.d_model) == (3, architecture, 8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "format_version"),
        ("unknown", 1, "unknown"),
        ("num_latents", 13, "holds"),
        ("coordinates", [1, 2, 4, 6], "do not belong together"),
        ("k", 0, "do not belong together"),
    ],
)
def test_record_that_does_not_fit_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    save_dictionary(str(tmp_path / "sae"), dictionary())
    file = tmp_path / "sae" / "dictionary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ModelError, match=message):
        load_dictionary(str(tmp_path / "sae"))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_dictionary(str(tmp_path / "sae"), dictionary())
    file = tmp_path / "sae" / "dictionary.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "scale"}, file)
    with pytest.raises(ModelError, match="holds"):
        load_dictionary(str(tmp_path / "sae"))
    file.write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be read"):
        load_dictionary(str(tmp_path / "sae"))
    with pytest.raises(ModelError, match="no dictionary"):
        load_dictionary(str(tmp_path / "missing"))


def test_training_saving_and_measuring_again(tmp_path: Path) -> None:
    model = reference(saved_model(tmp_path / "model", "qwen3"))
    section = SaeSection.model_validate(
        {
            "layer": 2,
            "coordinates": {"count": 6, "documents": 10},
            "num_latents": 16,
            "k": 4,
            "num_tokens": 300,
            "batch_tokens": 32,
            "epochs": 20,
        }
    )
    trained = train_dictionary(model, iter(documents()), section, lambda _: None)
    assert trained.fit.trained_tokens == 300
    assert trained.fit.held_out_tokens == 15
    assert len(trained.dictionary.autoencoder.coordinates) == 6
    save_dictionary(str(tmp_path / "sae"), trained.dictionary)
    again, fvu = adopt_dictionary(str(tmp_path / "sae"), model, documents())
    assert again.layer == 2
    assert fvu == pytest.approx(measure_fvu(model, documents(), trained.dictionary), rel=1e-6)
    assert fvu < 0.5
    with pytest.raises(StepFailed, match="no document"):
        train_dictionary(model, [], section, lambda _: None)


def test_dictionary_of_another_model_is_refused(tmp_path: Path) -> None:
    small = reference(saved_model(tmp_path / "small", "llama", num_layers=1))
    with pytest.raises(ModelError, match=r"block 2 of width 8.* has 1 blocks of width 16"):
        check_belongs(dictionary(), small)
    model = reference(saved_model(tmp_path / "model", "llama"))
    section = SaeSection.model_validate({"layer": 2, "coordinates": {"count": 16}, "num_latents": 16, "k": 4, "num_tokens": 300})
    trained = train_dictionary(model, documents(), section, lambda _: None)
    trained.dictionary.autoencoder.decoder_weight *= 30
    save_dictionary(str(tmp_path / "sae"), trained.dictionary)
    with pytest.raises(ModelError, match="was expected; it was trained on the same weights"):
        adopt_dictionary(str(tmp_path / "sae"), model, documents())
