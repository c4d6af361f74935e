import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dictionary import ARCHITECTURES, Reads, activations, assert_same, tiny_dictionary
from tiny_models import reference, saved_model

from finescope.errors import DictionaryError
from finescope.models.hooks import HookPoint
from finescope.sae.autoencoder import Architecture
from finescope.sae.dictionary import check_belongs, load_dictionary, save_dictionary


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reads", ["all", "some", "pca"])
@pytest.mark.parametrize("remote", [False, True])
def test_round_trip(tmp_path: Path, architecture: Architecture, reads: Reads, remote: bool) -> None:
    uri = f"memory://dictionary-{architecture}-{reads}" if remote else str(tmp_path / "sae")
    before = replace(tiny_dictionary(architecture, reads), fvu=None, model_fingerprint=None, moments_known=False)
    save_dictionary(uri, before)
    after = load_dictionary(uri)
    assert_same(after, before)
    assert torch.equal(after.autoencoder.encode(activations()), before.autoencoder.encode(activations()))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 3, r"dictionary\.json: format_version"),
        ("unknown", 1, "unknown"),
        ("num_latents", 13, "its weights are"),
        ("coordinates", list(range(24)), "other `coordinates`"),
        ("d_in", 20, r"expected rising indices below d_in \(20\)"),
        ("k", 0, r"k: 0, expected 1 to num_latents \(256\)"),
    ],
)
def test_record_that_does_not_fit_is_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    save_dictionary(str(tmp_path / "sae"), tiny_dictionary())
    file = tmp_path / "sae" / "dictionary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(DictionaryError, match=message):
        load_dictionary(str(tmp_path / "sae"))


def test_a_record_without_the_newest_key_is_read(tmp_path: Path) -> None:
    save_dictionary(str(tmp_path / "sae"), tiny_dictionary())
    file = tmp_path / "sae" / "dictionary.json"
    record = json.loads(file.read_text())
    del record["moments_known"]
    file.write_text(json.dumps(record))
    assert load_dictionary(str(tmp_path / "sae")).moments_known


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_dictionary(str(tmp_path / "sae"), tiny_dictionary())
    file = tmp_path / "sae" / "dictionary.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "scale"}, file)
    with pytest.raises(DictionaryError, match="its weights are"):
        load_dictionary(str(tmp_path / "sae"))
    file.write_bytes(b"no")
    with pytest.raises(DictionaryError, match="cannot be read"):
        load_dictionary(str(tmp_path / "sae"))


def test_a_folder_without_a_dictionary(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=r"no dictionary in .*dictionary\.json .*sae_weights\.saf.* sae\.saf"):
        load_dictionary(str(tmp_path / "missing"))
    (tmp_path / "ae.pt").write_bytes(b"")
    with pytest.raises(DictionaryError, match=r"'ae\.pt' is not read, as pickles can run code"):
        load_dictionary(str(tmp_path))


def test_dictionary_of_another_model_is_refused(tmp_path: Path) -> None:
    wide = tiny_dictionary("topk", "some", HookPoint(2))
    one = reference(saved_model(tmp_path / "one", "llama", num_layers=1))
    with pytest.raises(DictionaryError, match=r"dictionary of 'org/model' reads block 2; .* has 1 blocks"):
        check_belongs(wide, one)
    model = reference(saved_model(tmp_path / "model", "llama"))
    with pytest.raises(DictionaryError, match=r"reads block 2, residual, of width 64; there .* is of width 16"):
        check_belongs(wide, model)
    with pytest.raises(DictionaryError, match=r"mlp_hidden, of width 64; there .* is of width 24"):
        check_belongs(tiny_dictionary("topk", "some", HookPoint(2, "mlp_hidden")), model)
    check_belongs(wide, model.model_copy(update={"path": str(saved_model(tmp_path / "wide", "llama", hidden_size=64))}))
