import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finescope import schemas
from finescope.sae.statistics import LatentStatistics, latent_chunks, latents_table

LATENTS = 12
# Half of the values are 0; two decimals, so that sums in any order are equal to many digits.
_VALUES = st.one_of(st.just(0.0), st.integers(1, 400).map(lambda value: value / 16))
SETS = st.integers(1, 20).flatmap(lambda rows: arrays.arrays(np.float32, (rows, LATENTS), elements=_VALUES)).map(torch.from_numpy)
CUTS = st.lists(st.integers(0, 20), max_size=5)


def _dense(latents: Tensor) -> LatentStatistics:
    statistics = LatentStatistics(latents.shape[1])
    statistics.update(latents)
    return statistics


def _parts(latents: Tensor, cuts: list[int]) -> list[Tensor]:
    """The set cut at the places `cuts`; some of the parts are empty."""
    places = sorted(min(cut, len(latents)) for cut in cuts)
    return [latents[start:end] for start, end in zip([0, *places], [*places, len(latents)], strict=True)]


def _equal(one: LatentStatistics, other: LatentStatistics) -> None:
    assert one.count == other.count
    assert torch.equal(one.active, other.active)
    # Values are multiples of 1/16: every order of adding them gives the same double.
    assert torch.equal(one.total, other.total)
    assert torch.equal(one.largest, other.largest)


@given(SETS, CUTS)
def test_batches_have_no_say(latents: Tensor, cuts: list[int]) -> None:
    whole, parts = _dense(latents), LatentStatistics(LATENTS)
    for part in _parts(latents, cuts):
        parts.update(part)
    _equal(parts, whole)


@given(SETS, CUTS, st.integers(1, LATENTS))
def test_sparse_codes_give_what_dense_ones_give(latents: Tensor, cuts: list[int], k: int) -> None:
    values, ids = latents.topk(k, dim=1)
    dense = torch.zeros_like(latents).scatter_(1, ids, values)
    sparse = LatentStatistics(LATENTS)
    for of_ids, of_values in zip(_parts(ids, cuts), _parts(values, cuts), strict=True):
        sparse.update_sparse(of_ids, of_values)
    _equal(sparse, _dense(dense))


@given(SETS, SETS)
def test_merging_is_concatenation(first: Tensor, second: Tensor) -> None:
    merged = _dense(first)
    merged.merge(_dense(second))
    _equal(merged, _dense(torch.cat([first, second])))


@given(SETS)
def test_against_the_definitions(latents: Tensor) -> None:
    statistics, array = _dense(latents), latents.double().numpy()
    on = array > 0
    np.testing.assert_array_equal(statistics.frequency.numpy(), on.mean(0))
    assert statistics.l0 == pytest.approx(on.sum(1).mean(), rel=1e-15)
    assert statistics.dead_share == (~on.any(0)).mean()
    assert statistics.dense_share == (on.mean(0) > 0.1).mean()
    for latent in range(LATENTS):
        values = array[on[:, latent], latent]
        expected = (values.mean(), values.max()) if len(values) else (math.nan, 0.0)
        found = statistics.mean_active[latent].item(), statistics.largest[latent].item()
        np.testing.assert_allclose(found, expected, rtol=1e-15)


def test_by_hand() -> None:
    latents = torch.zeros(10, 4)
    latents[0, 0] = 2.0  # active on exactly a tenth: not dense
    latents[:2, 1] = torch.tensor([1.0, 4.0])
    latents[:, 2] = 3.0
    statistics = _dense(latents)
    assert statistics.frequency.tolist() == [0.1, 0.2, 1.0, 0.0]
    assert statistics.l0 == 1.3
    assert statistics.dead_share == 0.25
    assert statistics.dense_share == 0.5
    table = latents_table("wide", statistics)
    assert table.schema == schemas.LATENTS
    assert table.to_pydict() == {
        "dictionary": ["wide"] * 4,
        "latent": [0, 1, 2, 3],
        "active": [1, 2, 10, 0],
        "frequency": [0.1, 0.2, 1.0, 0.0],
        "mean_activation": [2.0, 2.5, 3.0, None],
        "max_activation": [2.0, 4.0, 3.0, None],
    }


def test_nothing_seen_is_not_a_number() -> None:
    statistics = _dense(torch.zeros(0, 3))
    statistics.update_sparse(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    figures = [statistics.l0, statistics.dead_share, statistics.dense_share, *statistics.frequency.tolist()]
    assert all(math.isnan(figure) for figure in figures)


def test_counts_are_exact_where_single_precision_ends() -> None:
    statistics = _dense(torch.ones(1, 2))
    for _ in range(25):
        statistics.merge(statistics)
    statistics.update(torch.tensor([[1.0, 0.0]]))
    assert statistics.count == 2**25 + 1
    assert statistics.active.tolist() == statistics.total.tolist() == [2**25 + 1, 2**25]


def test_chunks_hold_few_latents_and_all_rows() -> None:
    activations = torch.arange(5000.0)[:, None]
    chunks = latent_chunks(activations, 65_536)
    assert max(len(chunk) for chunk in chunks) * 65_536 * 4 <= 64 * 2**20
    assert torch.equal(torch.cat(chunks), activations)
