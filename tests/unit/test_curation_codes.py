from functools import reduce
from operator import add

import numpy as np
import pyarrow as pa
import pytest
from curation_codes import codes_from, dense_of, matrices
from hypothesis import given, settings

from finescope.curation.codes import CorpusStatistics, codes_of, normalise


def table(ids: list[list[int] | None], values: list[list[float] | None]) -> pa.Table:
    halves = pa.array(values, pa.list_(pa.float32())).cast(pa.list_(pa.float16()))
    return pa.table({"latent_ids": pa.array(ids, pa.list_(pa.int32())), "latent_values": halves})


def test_codes_of_a_table():
    codes = codes_of(table([[1, 3], [], None, [0]], [[0.5, 2.0], [], None, [1.0]]), 4)
    assert len(codes) == 4
    assert codes.dense().tolist() == [[0, 0.5, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    ids, values = codes.row(0)
    assert (ids.tolist(), values.tolist(), values.dtype) == ([1, 3], [0.5, 2.0], np.float32)
    assert codes.row(1)[0].tolist() == []


def test_codes_of_slices_and_chunks():
    whole = table([[1], [2, 3], [0]], [[1.0], [2.0, 3.0], [4.0]])
    assert codes_of(whole.slice(1, 2), 4).dense().tolist() == [[0, 0, 2, 3], [4, 0, 0, 0]]
    twice = pa.concat_tables([whole.slice(2), whole.slice(0, 1)])
    assert codes_of(twice, 4).dense().tolist() == [[4, 0, 0, 0], [0, 1, 0, 0]]
    for nothing in (whole.slice(3), whole.schema.empty_table()):
        assert codes_of(nothing, 4).dense().shape == (0, 4)


def test_sums_of_rows():
    codes = codes_of(table([[], [1, 2], [], [0], []], [[], [1.0, 2.0], [], [5.0], []]), 3)
    assert codes.sum_rows(codes.values).tolist() == [0, 3, 0, 5, 0]
    assert codes.sum_rows(np.stack([codes.values, -codes.values], axis=1)).tolist() == [[0, 0], [3, -3], [0, 0], [5, -5], [0, 0]]
    empty = codes_of(table([[], []], [[], []]), 3)
    assert empty.sum_rows(empty.values).tolist() == [0, 0]


def test_normalised_codes_sum_to_one():
    codes = normalise(codes_of(table([[0, 1], [], [2]], [[1.0, 3.0], [], [7.0]]), 3))
    assert codes.dense().tolist() == [[0.25, 0.75, 0], [0, 0, 0], [0, 0, 1]]


def test_statistics_known_by_hand():
    found = CorpusStatistics.of(codes_of(table([[0, 1], [], [1]], [[1.0, 3.0], [], [4.0]]), 3))
    assert found.documents == 3
    assert found.share_sum.tolist() == [0.25, 1.75, 0]
    assert found.sqrt_sum.tolist() == pytest.approx([0.5, 0.75**0.5 + 1, 0])
    assert found.active.tolist() == [1, 2, 0]


@given(matrices(1, 8))
@settings(max_examples=40, deadline=None)
def test_sparse_is_dense(matrix: np.ndarray):
    codes = codes_from(matrix)
    assert np.array_equal(dense_of(codes), matrix)
    assert np.array_equal(codes.dense(), matrix)
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros_like(matrix), where=totals > 0)
    np.testing.assert_allclose(normalise(codes).dense(), shares, rtol=1e-6)
    found = CorpusStatistics.of(codes)
    np.testing.assert_allclose(found.sqrt_sum, np.sqrt(shares).sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.share_sum, shares.sum(axis=0), rtol=1e-6)
    assert np.array_equal(found.active, (matrix > 0).sum(axis=0))


@given(matrices(2, 9))
@settings(max_examples=30, deadline=None)
def test_statistics_of_shards_add_up(matrix: np.ndarray):
    whole = CorpusStatistics.of(codes_from(matrix))
    shards = [CorpusStatistics.of(codes_from(part)) for part in np.array_split(matrix, 3)]
    summed = reduce(add, shards)
    assert summed.documents == whole.documents == len(matrix)
    assert np.array_equal(summed.active, whole.active)
    np.testing.assert_allclose(summed.sqrt_sum, whole.sqrt_sum, rtol=1e-12)
    np.testing.assert_allclose(summed.share_sum, whole.share_sum, rtol=1e-12)
