from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from finescope.sae.stream import fill_buffers


def chunks(total: int, size: int) -> Iterator[Tensor]:
    yield from torch.arange(float(total))[:, None].split(size)


def cut(total: int, size: int, **settings: int) -> tuple[list[list[float]], list[float]]:
    fills = [
        (fill.activations[:, 0].tolist(), fill.held_out[:, 0].tolist(), fill.last)
        for fill in fill_buffers(chunks(total, size), **settings)
    ]
    assert [last for _, _, last in fills] == [False] * (len(fills) - 1) + [True]
    return [trained for trained, _, _ in fills], fills[-1][1]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_fills_follow_the_stream_and_the_tail_is_held_out(size: int) -> None:
    fills, tail = cut(1000, size, num_tokens=20, held_out=4, buffer_tokens=8)
    assert [len(fill) for fill in fills] == [8, 8, 4]
    assert [value for fill in fills for value in fill] == [float(i) for i in range(20)]
    assert tail == [20.0, 21.0, 22.0, 23.0]


@pytest.mark.parametrize(("total", "trained"), [(12, 10), (24, 20), (3, 1), (18, 15)])
def test_stream_that_ends_early_gives_the_same_share(total: int, trained: int) -> None:
    fills, tail = cut(total, 5, num_tokens=20, held_out=4, buffer_tokens=100)
    assert [value for fill in fills for value in fill] == [float(i) for i in range(trained)]
    assert tail == [float(i) for i in range(trained, total)]


def test_no_more_is_read_than_is_needed() -> None:
    stream = chunks(1000, 4)
    list(fill_buffers(stream, num_tokens=8, held_out=1, buffer_tokens=8))
    assert next(stream)[0, 0] == 12


def test_empty_stream_gives_nothing() -> None:
    assert not list(fill_buffers(iter(()), num_tokens=8, held_out=1, buffer_tokens=8))
