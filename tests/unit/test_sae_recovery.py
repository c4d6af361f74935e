import math

import numpy as np
import pytest
import torch
from sae_dictionaries import dictionary_of, model_of, random_autoencoder
from torch import Tensor
from transformers import PreTrainedModel

from finescope.corpus.tokenise import pad_batch
from finescope.models.hooks import HookPoint
from finescope.sae import statistics
from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.dictionary import Dictionary
from finescope.sae.recovery import CrossEntropy, cross_entropy_recovered
from finescope.sae.stream import TokenBatch

LENGTHS = (7, 2, 1, 12, 5, 9)
HOOK = HookPoint(2)


def _documents() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, 64, size=length).astype(np.int32) for length in LENGTHS]


def _batches(size: int, left: bool = False) -> list[TokenBatch]:
    documents = _documents()
    padded = [pad_batch(documents[start : start + size], 0) for start in range(0, len(documents), size)]
    if not left:
        return padded
    turned = []
    for ids, mask in padded:
        shifts = mask.shape[1] - mask.sum(1)
        turned.append(tuple(np.stack([np.roll(row, by) for row, by in zip(part, shifts, strict=True)]) for part in (ids, mask)))
    return turned


def _measure(model: PreTrainedModel, *dictionaries: Dictionary, batches: list[TokenBatch]) -> list[CrossEntropy]:
    return cross_entropy_recovered(model, dictionaries, batches, lambda _: None)


def _naive(model: PreTrainedModel, autoencoder: SparseAutoencoder | None, zeroed: bool = False) -> float:
    """Documents one by one, whole logits, the values of block 2 changed row by row from position 1 on."""
    block, total, targets = model.get_submodule("model.layers.1" if hasattr(model, "model") else "transformer.h.1"), 0.0, 0

    def change(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...] | None:
        if autoencoder is None:
            return None
        value = output[0] if isinstance(output, tuple) else output
        changed = value.clone()
        for position in range(1, value.shape[1]):
            row = value[0, position][None]
            reconstruction = torch.zeros(1, len(autoencoder.mean)) if zeroed else autoencoder(row)
            if autoencoder.basis is None:
                changed[0, position, autoencoder.coordinates] = reconstruction[0]
            else:
                seen = (reconstruction - row[:, autoencoder.coordinates] @ autoencoder.basis.T) @ autoencoder.basis
                changed[0, position, autoencoder.coordinates] += seen[0]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = block.register_forward_hook(change)
    for document in _documents():
        ids = torch.from_numpy(document).long()[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        total -= sum(float(logits[t - 1].log_softmax(-1)[ids[0, t]]) for t in range(1, ids.shape[1]))
        targets += ids.shape[1] - 1
    handle.remove()
    return total / targets


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("left", [False, True])
def test_equals_the_naive_losses(family: str, left: bool) -> None:
    model, autoencoder = model_of(family), random_autoencoder()
    (found,) = _measure(model, dictionary_of(autoencoder, HOOK), batches=_batches(4, left))
    assert found.tokens == sum(length - 1 for length in LENGTHS)
    assert found.base == pytest.approx(_naive(model, None), rel=1e-5)
    assert found.spliced == pytest.approx(_naive(model, autoencoder), rel=1e-5)
    assert found.zeroed == pytest.approx(_naive(model, autoencoder, zeroed=True), rel=1e-5)
    assert len({round(loss, 4) for loss in found[:3]}) == 3, "the three models differ"
    assert found.recovered == pytest.approx((found.zeroed - found.spliced) / (found.zeroed - found.base), rel=1e-12)


def test_a_subspace_is_replaced_and_zeroed_in_its_directions_alone() -> None:
    basis = torch.linalg.qr(torch.randn(16, 5, generator=torch.Generator().manual_seed(2)))[0].T.contiguous()
    model, autoencoder = model_of("llama"), random_autoencoder(coordinates=tuple(range(16)), basis=basis)
    (found,) = _measure(model, dictionary_of(autoencoder, HOOK), batches=_batches(2))
    assert found.spliced == pytest.approx(_naive(model, autoencoder), rel=1e-5)
    assert found.zeroed == pytest.approx(_naive(model, autoencoder, zeroed=True), rel=1e-5)


def test_batches_have_no_say_and_dictionaries_none_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    several = [
        dictionary_of(random_autoencoder("relu_l1"), HOOK),
        dictionary_of(random_autoencoder("jumprelu", seed=1), HookPoint(3, "mlp")),
        dictionary_of(random_autoencoder("batch_topk", seed=2, coordinates=(2, 20), d_in=24), HookPoint(4, "mlp_hidden")),
    ]
    together = _measure(model, *several, batches=_batches(len(LENGTHS)))
    monkeypatch.setattr(statistics, "_LATENT_BYTES", 1)
    for dictionary, found in zip(several, together, strict=True):
        for size in (1, 3):
            (alone,) = _measure(model, dictionary, batches=_batches(size))
            np.testing.assert_allclose(alone, found, rtol=1e-5)
    assert len({found.base for found in together}) == 1


def test_a_perfect_dictionary_recovers_all_and_an_empty_one_nothing() -> None:
    identity = torch.eye(16)
    perfect = SparseAutoencoder(
        {
            "encoder_weight": torch.cat([identity, -identity]),
            "encoder_bias": torch.zeros(32),
            "decoder_weight": torch.cat([identity, -identity]),
            "decoder_bias": torch.zeros(16),
            "coordinates": torch.arange(16),
            "mean": torch.zeros(16),
            "scale": torch.ones(16),
        },
        architecture="relu_l1",
        k=1,
        d_in=16,
    )
    empty = SparseAutoencoder(
        {**perfect.state_dict(), "decoder_weight": torch.zeros(32, 16)}, architecture="relu_l1", k=1, d_in=16
    )
    full, none = _measure(model_of("llama"), dictionary_of(perfect, HOOK), dictionary_of(empty, HOOK), batches=_batches(3))
    assert full.recovered == pytest.approx(1.0, abs=1e-5)
    assert none.recovered == pytest.approx(0.0, abs=1e-5)


def test_nothing_to_predict_is_not_a_number_and_the_mode_is_left_as_it_was() -> None:
    model = model_of("llama").train()
    dictionary, done = dictionary_of(random_autoencoder(), HOOK), []
    (found,) = cross_entropy_recovered(model, [dictionary], [pad_batch([np.array([5]), np.array([6])], 0)], done.append)
    assert found.tokens == 0
    assert math.isnan(found.base)
    assert math.isnan(found.recovered)
    assert done == [2]
    assert model.training
    assert not any(block._forward_hooks for block in model.modules())
