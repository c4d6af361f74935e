import math

import pytest
import torch

from finescope.distillation.sampling import Sampler

LOGITS = [2.0, 1.0, 0.0, -50.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature: float) -> None:
    rows, steps = 400, 25
    sampler = Sampler(range(rows), temperature, torch.device("cpu"))
    counts = torch.zeros(4)
    for _ in range(steps):
        counts += torch.bincount(sampler.choose(torch.tensor(LOGITS).expand(rows, 4)), minlength=4)
    weights = [math.exp(logit / temperature) for logit in LOGITS]
    for count, weight in zip(counts.tolist(), weights, strict=True):
        share = weight / sum(weights)
        # Four standard errors of a share among 10,000 draws.
        assert abs(count / (rows * steps) - share) <= 4 * math.sqrt(share * (1 - share) / (rows * steps))


def test_a_row_draws_the_same_when_others_leave() -> None:
    logits = torch.zeros(3, 50)
    whole, left = (Sampler([7, 8, 9], 1.0, torch.device("cpu")) for _ in range(2))
    first = [whole.choose(logits) for _ in range(2)]
    assert left.choose(logits).equal(first[0])
    left.keep_rows([2, 0])
    assert left.choose(logits[:2]).equal(first[1][[2, 0]])
    assert not first[0].equal(first[1])


def test_temperature_zero_is_the_most_likely_token() -> None:
    assert Sampler([0, 0], 0.0, torch.device("cpu")).choose(torch.tensor([[0.0, 3.0], [1.0, 0.0]])).tolist() == [1, 0]
