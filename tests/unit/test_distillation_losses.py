import pytest
import torch
from distillation_fixtures import tiny_llama
from torch.nn import functional

from finescope.distillation.examples import IGNORED
from finescope.distillation.losses import cross_entropy_sum
from finescope.distillation.student import Student


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_loss_and_gradients_equal_the_naive_ones(chunk_rows: int, weight_grad: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=weight_grad)
    targets = torch.randint(0, 11, (7,))
    naive = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.3
    wanted = [hidden, weight] if weight_grad else [hidden]
    expected = torch.autograd.grad(naive, wanted)
    loss = cross_entropy_sum(hidden, weight, targets, chunk_rows) * 0.3
    found = torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(found, expected)


def test_known_by_hand() -> None:
    # Two equal logits: p = 1/2, the loss ln 2; gradient of hidden = (p - onehot) @ weight.
    hidden, weight = torch.zeros(1, 2, requires_grad=True), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = cross_entropy_sum(hidden, weight, torch.tensor([0]), 1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.6931472)
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize("tied", [True, False])
def test_student_equals_transformers_loss(tied: bool) -> None:
    model = tiny_llama(tied)
    tokens = torch.randint(3, 259, (2, 9))
    targets = torch.full_like(tokens, IGNORED)
    targets[0, 3:8], targets[1, 0:4] = tokens[0, 4:9], tokens[1, 1:5]
    logits = model(input_ids=tokens).logits
    naive = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    parameters = list(model.parameters())
    expected = torch.autograd.grad(naive, parameters)
    loss = Student(model)(tokens, targets)
    found = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_nothing_to_train_on_is_zero_with_zero_gradients() -> None:
    model = tiny_llama()
    loss = Student(model)(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
