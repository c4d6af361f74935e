from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import reference, saved_model, tiny_model
from torch import Tensor

from finescope.errors import DictionaryError, StepFailed
from finescope.models.hooks import HookPoint, Site, capture
from finescope.models.load import ModelReference
from finescope.sae.adopt import adopt_dictionary
from finescope.sae.autoencoder import SparseAutoencoder, fold
from finescope.sae.dictionary import load_dictionary, save_dictionary
from finescope.sae.fvu import FvuMeter
from finescope.sae.record import Dictionary
from finescope.sae.saelens import save_saelens
from finescope.sae.stream import TokenBatch

HOOK = HookPoint(2, "mlp")


def documents(count: int = 60, seed: int = 0) -> list[TokenBatch]:
    """Batches of eight documents of 12 tokens, every third of 8."""
    ids = np.random.default_rng(seed).integers(1, 64, (count, 12))
    mask = np.ones_like(ids)
    mask[::3, 8:] = 0
    return [(ids[at : at + 8], mask[at : at + 8]) for at in range(0, count, 8)]


def seen(batches: list[TokenBatch], hook: HookPoint = HOOK) -> Tensor:
    """Their activations, one document at a time, without each one's first token."""
    model, rows = tiny_model("llama"), []
    for ids, mask in batches:
        for row, used in zip(torch.from_numpy(ids), torch.from_numpy(mask), strict=True):
            (value,) = capture(model, row[None], used[None], [hook])
            rows.append(value[0, 1 : int(used.sum())])
    return torch.cat(rows).float()


def identity(kept: float, mean: Tensor, scale: Tensor, hook: HookPoint = HOOK) -> Dictionary:
    """Latents +x and -x of each standardised coordinate, so that the reconstruction is `kept` of the distance to the mean."""
    width = len(mean)
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    weights = fold(both, torch.zeros(2 * width), both * kept, torch.zeros(width), mean, scale)
    weights |= {"coordinates": torch.arange(width)}
    autoencoder = SparseAutoencoder(weights, architecture="relu_l1", k=2 * width, d_in=width)
    return Dictionary(autoencoder, hook, "all", "org/model", None, "f" * 64, "model.layers.1.mlp", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelReference:
    return reference(saved_model(tmp_path_factory.mktemp("adopt") / "model", "llama"))


def saved(tmp_path: Path, dictionary: Dictionary) -> str:
    uri = str(tmp_path / "sae")
    save_dictionary(uri, dictionary)
    return uri


@pytest.mark.parametrize("site", ["residual", "attention", "mlp", "mlp_hidden"])
def test_fvu_is_measured_over_the_whole_set(tmp_path: Path, model: ModelReference, site: Site) -> None:
    hook = HookPoint(2, site)
    values = seen(documents(), hook)
    before = identity(0.8, values.mean(0) + 0.1, values.std(0) * 2, hook)
    adopted = adopt_dictionary(saved(tmp_path, before), model, iter(documents()))
    meter = FvuMeter()
    scale = before.autoencoder.scale
    meter.update(values / scale, before.autoencoder(values) / scale)
    assert adopted.fvu == pytest.approx(meter.value, rel=1e-4)
    assert adopted.tokens == len(values)
    assert (adopted.recorded_fvu, adopted.dictionary.fvu, adopted.warning) == (None, adopted.fvu, None)
    assert not adopted.moments_estimated
    assert torch.equal(adopted.dictionary.autoencoder.scale, scale)
    assert adopted.dictionary.module.startswith("model.layers.1")


def test_batches_do_not_matter(tmp_path: Path, model: ModelReference) -> None:
    values = seen(documents())
    uri = saved(tmp_path, identity(0.8, values.mean(0) + values.std(0), values.std(0)))
    whole = adopt_dictionary(uri, model, documents())
    singly = [(ids[row : row + 1], mask[row : row + 1]) for ids, mask in documents() for row in range(len(ids))]
    alone = adopt_dictionary(uri, model, singly)
    assert alone.fvu == pytest.approx(whole.fvu, rel=1e-5)
    assert alone.fvu_error == pytest.approx(whole.fvu_error, rel=1e-4)


def test_mean_and_scale_that_are_not_known_are_estimated(tmp_path: Path, model: ModelReference) -> None:
    values = seen(documents())
    before = identity(0.9, values.mean(0), values.std(0))
    before.autoencoder.mean, before.autoencoder.scale = torch.zeros(16), torch.ones(16)
    before = replace(before, moments_known=False, model_fingerprint=None)
    adopted = adopt_dictionary(saved(tmp_path, before), model, documents())
    autoencoder = adopted.dictionary.autoencoder
    torch.testing.assert_close(autoencoder.mean, values.double().mean(0).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(autoencoder.scale, values.double().std(0, correction=0).float(), rtol=1e-4, atol=1e-6)
    assert (adopted.moments_estimated, adopted.dictionary.moments_known, adopted.fvu_error) == (True, True, None)
    # What is left of each coordinate is a tenth of its distance to the mean, whatever its size.
    assert adopted.fvu == pytest.approx(0.01, rel=1e-3)
    save_dictionary(str(tmp_path / "again"), adopted.dictionary)
    again = adopt_dictionary(str(tmp_path / "again"), model, documents())
    assert again.fvu == pytest.approx(adopted.fvu, rel=1e-5)
    assert (again.recorded_fvu, again.warning, again.moments_estimated) == (adopted.fvu, None, False)


def test_a_dictionary_in_another_layout(tmp_path: Path, model: ModelReference) -> None:
    values = seen(documents())
    before = replace(identity(0.8, values.mean(0), values.std(0)), fvu=0.04)
    save_saelens(str(tmp_path / "sae"), before)
    adopted = adopt_dictionary(str(tmp_path / "sae"), model, documents())
    assert adopted.fvu == pytest.approx(0.04, rel=0.01)
    assert load_dictionary(str(tmp_path / "sae")).module == adopted.dictionary.module.removesuffix(".down_proj")


def test_the_standard_error_is_that_of_documents(tmp_path: Path, model: ModelReference) -> None:
    many = documents(2000, seed=1)
    values = seen(many[:25])
    uri = saved(tmp_path, identity(0.5, values.mean(0) + values.std(0), values.std(0)))
    found = [adopt_dictionary(uri, model, many[at : at + 25]) for at in range(0, 250, 25)]
    spread = np.std([adopted.fvu for adopted in found], ddof=1)
    errors = [adopted.fvu_error for adopted in found]
    assert all(error is not None and 0.4 < spread / error < 2.5 for error in errors)


@pytest.mark.parametrize(("apart", "warns"), [(0.0, False), (0.015, False), (-0.03, True), (0.3, True)])
def test_an_fvu_that_differs_from_the_recorded_one_is_told(
    tmp_path: Path, model: ModelReference, apart: float, warns: bool
) -> None:
    values = seen(documents())
    before = replace(identity(0.6, values.mean(0), values.std(0)), fvu=0.16 + apart)
    adopted = adopt_dictionary(saved(tmp_path, before), model, documents())
    assert adopted.dictionary.fvu == adopted.recorded_fvu == 0.16 + apart
    assert (adopted.warning is not None) == warns
    if adopted.warning:
        assert "FVU 0.160 on these documents" in adopted.warning


def test_few_documents_may_differ_more(tmp_path: Path, model: ModelReference) -> None:
    values = seen(documents())
    before = identity(0.5, values.mean(0) + values.std(0), values.std(0))
    uri = saved(tmp_path, before)
    few, all_of_them = (adopt_dictionary(uri, model, documents()[:count]) for count in (1, 8))
    assert few.fvu_error is not None
    assert all_of_them.fvu_error is not None
    assert few.fvu_error > 1.5 * all_of_them.fvu_error
    apart = 3 * few.fvu_error
    assert apart > 0.02
    save_dictionary(uri, replace(before, fvu=few.fvu + apart))
    assert adopt_dictionary(uri, model, documents()[:1]).warning is None


def test_a_dictionary_that_explains_nothing_is_refused(tmp_path: Path, model: ModelReference) -> None:
    values = seen(documents())
    wrong = replace(identity(-0.5, values.mean(0), values.std(0)), fvu=0.25)
    with pytest.raises(DictionaryError, match=r"is 2\.25, 0\.25 was expected; it was trained on other weights"):
        adopt_dictionary(saved(tmp_path, wrong), model, documents())
    same = replace(wrong, model_fingerprint=model.fingerprint)
    with pytest.raises(DictionaryError, match="trained on the same weights"):
        adopt_dictionary(saved(tmp_path, same), model, documents())
    unknown = replace(wrong, model_fingerprint=None, fvu=None)
    with pytest.raises(DictionaryError, match=r"is 2\.25; it was trained on unknown weights"):
        adopt_dictionary(saved(tmp_path, unknown), model, documents())


def test_no_documents(tmp_path: Path, model: ModelReference) -> None:
    uri = saved(tmp_path, identity(0.8, torch.zeros(16), torch.ones(16)))
    with pytest.raises(StepFailed, match="no activation to measure"):
        adopt_dictionary(uri, model, [(np.ones((3, 1), np.int64), np.ones((3, 1), np.int64))])


def test_a_hook_after_the_norm_is_not_taken_for_one_before(tmp_path: Path, model: ModelReference) -> None:
    lens = replace(identity(0.8, torch.zeros(16), torch.ones(16)), module="blocks.1.hook_mlp_out")
    gemma = model.model_copy(update={"model_type": "gemma2"})
    with pytest.raises(DictionaryError, match=r"'blocks\.1\.hook_mlp_out' of family 'gemma2' is read after the norm"):
        adopt_dictionary(saved(tmp_path, lens), gemma, documents())
