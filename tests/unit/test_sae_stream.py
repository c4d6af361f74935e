import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from finescope.sae.stream import ShuffleBuffer, used_positions

CPU = torch.device("cpu")


class Source:
    """Chunks of rising numbers, some of them empty; remembers which were opened."""

    def __init__(self, sizes: list[int]) -> None:
        ends = np.cumsum([0, *sizes])
        self.chunks = [np.arange(a, b, dtype=np.float32)[:, None] for a, b in itertools.pairwise(ends)]
        self.read: list[int] = []

    def __call__(self, start: int, stop: int, step: int) -> Iterator[np.ndarray]:
        for number in range(start, stop, step):
            self.read.append(number)
            yield self.chunks[number]


def values(fill: torch.Tensor) -> list[float]:
    return fill[:, 0].tolist()


@pytest.mark.parametrize("sizes", [[10, 10], [3, 0, 7, 10], [20], [1] * 20, [0, 0, 20, 0]])
def test_fills_follow_the_stream(sizes: list[int]) -> None:
    buffer = ShuffleBuffer(Source(sizes), range(len(sizes)), 8, 1, CPU)
    fills = []
    while not buffer.ended():
        fills.append(values(buffer.fill(100)))
    assert [len(fill) for fill in fills] == [8, 8, 4]
    assert [value for fill in fills for value in fill] == [float(number) for number in range(20)]
    assert values(buffer.fill(5)) == []


def test_a_share_reads_its_chunks_alone() -> None:
    source = Source([2] * 6)
    buffer = ShuffleBuffer(source, range(1, 6, 2), 100, 1, CPU)
    assert values(buffer.fill(100)) == [2, 3, 6, 7, 10, 11]
    assert source.read == [1, 3, 5]


def test_no_more_is_read_than_is_asked_for() -> None:
    source = Source([4] * 10)
    buffer = ShuffleBuffer(source, range(10), 8, 1, CPU)
    assert values(buffer.fill(6)) == [0, 1, 2, 3, 4, 5]
    assert source.read == [0, 1]


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_buffer_goes_on_where_another_stood(cut: int) -> None:
    sizes = [5, 0, 3, 9, 1, 6]
    whole, first, second = (ShuffleBuffer(Source(sizes), range(6), 5, 1, CPU) for _ in range(3))
    expected = [values(whole.fill(100)) for _ in range(5)]
    for _ in range(cut):
        first.fill(100)
    assert not first.ended()
    second.resume(first.chunk, first.offset)
    assert [values(second.fill(100)) for _ in range(5 - cut)] == expected[cut:]


def test_an_empty_stream_has_ended() -> None:
    assert ShuffleBuffer(Source([]), range(0), 8, 1, CPU).ended()
    assert ShuffleBuffer(Source([0, 0]), range(2), 8, 1, CPU).ended()


def test_memory_is_the_buffer_whatever_is_read() -> None:
    buffer = ShuffleBuffer(Source([50] * 40), range(40), 8, 1, CPU)
    places = {buffer.fill(100).data_ptr() for _ in range(200)}
    assert len(places) == 1


def test_the_first_token_is_left_out_on_either_side_of_the_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]])
    assert used_positions(mask).int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
