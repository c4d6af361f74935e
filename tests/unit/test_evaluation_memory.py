import torch
from tiny_models import tiny_model

from finescope.evaluation.memory import TensorMemory, parameter_bytes


def test_the_peak_is_what_was_alive_at_once() -> None:
    before = torch.ones(1000)
    with TensorMemory() as memory:
        doubled = before * 2  # 4,000 bytes
        third = doubled + before  # and 4,000 more
        del doubled
        assert memory.peak_bytes == 8000
        fourth = third[:500] + 1  # a view costs nothing, its sum 2,000
        assert memory.peak_bytes == 8000
        fifth = third + 1  # 4,000 + 2,000 + 4,000
    assert memory.peak_bytes == 10_000
    assert len(fourth) + len(fifth) == 1500


def test_what_is_changed_in_place_or_looked_at_is_not_counted() -> None:
    before = torch.ones(1000)
    with TensorMemory() as memory:
        before.add_(1)
        before.view(10, 100).t()[3].unsqueeze(0)
        torch.add(before, 1, out=before)
    assert memory.peak_bytes == 0


def test_many_rounds_take_no_more_than_two() -> None:
    before, total = torch.ones(1000), None
    with TensorMemory() as memory:
        for _ in range(10):
            total = (before + 1).sum()
    assert memory.peak_bytes == 4000 + 2 * 4  # the sum of the last round is still there when the next one is made
    assert total == 2000


def test_bytes_of_the_weights() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameter_bytes(model) == 4 * parameters
    assert parameter_bytes(model.half()) == 2 * parameters
