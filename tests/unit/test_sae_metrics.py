import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_dictionaries import random_autoencoder

from finescope.sae.autoencoder import Architecture
from finescope.sae.fvu import FvuMeter
from finescope.sae.metrics import DictionaryMeter, metric_rows
from finescope.sae.naming import MAIN, dictionary_of, metric_name
from finescope.sae.recovery import CrossEntropy
from finescope.sae.stability import Stability


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "relu_l1"])
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 50), max_size=5), seed=st.integers(0, 9))
def test_batches_have_no_say(architecture: Architecture, cuts: list[int], seed: int) -> None:
    autoencoder = random_autoencoder(architecture)
    activations = 3 * torch.randn(50, 16, generator=torch.Generator().manual_seed(seed)) + 1
    cut, naive = DictionaryMeter(autoencoder), autoencoder.encode(activations)
    places = sorted(cuts)
    for start, end in zip([0, *places], [*places, 50], strict=True):
        cut.update(activations[start:end])
    found = dict(metric_rows(MAIN, cut, None, None))
    on = naive > 0
    assert found["l0"] == pytest.approx(on.sum(1).double().mean().item(), rel=1e-12)
    assert found["dead_share"] == (~on.any(0)).double().mean().item()
    assert found["dense_share"] == (on.double().mean(0) > 0.1).double().mean().item()
    x = autoencoder.select(activations).double() / autoencoder.scale
    guess = autoencoder(activations).double() / autoencoder.scale
    expected = (x - guess).square().sum() / (x - x.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(expected.item(), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=8), offset=st.sampled_from([0.0, 1e3, 1e6]))
def test_a_large_mean_does_not_cancel(cuts: list[int], offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    x[:, 1] += offset
    guess = x + 0.1 * torch.randn(300, 3, generator=generator, dtype=torch.float64)
    meter, places = FvuMeter(), sorted(cuts)
    for start, end in zip([0, *places], [*places, 300], strict=True):
        meter.update(x[start:end], guess[start:end])
    naive = (x - guess).square().sum() / (x - x.mean(0)).square().sum()
    # E[x^2] - E[x]^2 would be wrong from the fifth digit on, for the offset of 1e6.
    assert meter.value == pytest.approx(naive.item(), rel=1e-9)


def test_names_of_the_rows() -> None:
    meter = DictionaryMeter(random_autoencoder())
    meter.update(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    rows = metric_rows("wide", meter, CrossEntropy(2.0, 2.5, 4.0, 100), Stability(0.8, 0.75))
    expected = ["fvu", "l0", "dead_share", "dense_share"]
    expected += ["ce_base", "ce_spliced", "ce_zeroed", "ce_recovered", "stability", "stable_share"]
    assert [name for name, _ in rows] == [f"wide/{name}" for name in expected]
    assert [value for _, value in rows][4:] == [2.0, 2.5, 4.0, 0.75, 0.8, 0.75]
    assert [name for name, _ in metric_rows(MAIN, meter, None, None)] == expected[:4]
    assert all(isinstance(value, float) for _, value in rows)


def test_names_read_back() -> None:
    for dictionary in (MAIN, "wide", "a/b"):
        assert dictionary_of(metric_name(dictionary, "fvu")) == (dictionary, "fvu")


def test_nothing_seen_is_not_a_number() -> None:
    assert all(math.isnan(value) for _, value in metric_rows(MAIN, DictionaryMeter(random_autoencoder()), None, None))
