import math

import pytest
import torch
from distillation_fixtures import tiny_llama
from tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional

from finescope.distillation.batches import IGNORED
from finescope.distillation.losses import Divergence, Mixture, Teacher, head_loss
from finescope.distillation.student import Student

PLAIN = Mixture(0.0)
DIVERGENCES: tuple[Divergence, ...] = ("forward", "reverse", "jensen_shannon")


def loss_of(student: Student, tokens: Tensor, targets: Tensor) -> Tensor:
    return student(tokens, targets, None, None, None)[0]


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_loss_and_gradients_equal_the_naive_ones(chunk_rows: int, weight_grad: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=weight_grad)
    targets = torch.randint(0, 11, (7,))
    naive = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.3
    wanted = [hidden, weight] if weight_grad else [hidden]
    expected = torch.autograd.grad(naive, wanted)
    loss = head_loss(hidden, weight, targets, chunk_rows, None, Mixture(0.5), None).total * 0.3
    found = torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(found, expected)


def test_known_by_hand() -> None:
    # Two equal logits: p = 1/2, the loss ln 2; gradient of hidden = (p - onehot) @ weight.
    hidden, weight = torch.zeros(1, 2, requires_grad=True), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = head_loss(hidden, weight, torch.tensor([0]), 1, None, PLAIN, None).total
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.6931472)
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.5, 0.5]]))


def naive_mixture(logits: Tensor, targets: Tensor, teacher_logits: Tensor, k: int, mixture: Mixture) -> tuple[Tensor, Teacher]:
    """The mixture by torch's own differentiation, and the teacher as it is stored."""
    temperature = mixture.temperature
    log_p = (teacher_logits / temperature).log_softmax(-1)
    top, ids = log_p.topk(k, -1)
    mask = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, ids, True)
    outcomes = torch.cat([top, log_p.masked_fill(mask, -torch.inf).logsumexp(1, keepdim=True)], 1)
    log_q = (logits / temperature).log_softmax(-1)
    students = torch.cat([log_q.gather(1, ids), log_q.masked_fill(mask, -torch.inf).logsumexp(1, keepdim=True)], 1)
    p, q = outcomes.exp(), students.exp()
    m = 0.5 * (p + q)
    divergence = {
        "forward": (p * (outcomes - students)).sum(),
        "reverse": (q * (students - outcomes)).sum(),
        "jensen_shannon": 0.5 * (p * (outcomes - m.log())).sum() + 0.5 * (q * (students - m.log())).sum(),
    }[mixture.divergence]
    cross_entropy = functional.cross_entropy(logits, targets, reduction="sum")
    return (1 - mixture.weight) * cross_entropy + mixture.weight * temperature**2 * divergence, Teacher(ids, outcomes)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_mixtures_equal_the_naive_ones(kind: Divergence, temperature: float, weight: float, cap: float | None) -> None:
    torch.manual_seed(1)
    hidden, matrix = torch.randn(9, 6, requires_grad=True), torch.randn(23, 6, requires_grad=True)
    targets, teacher_logits = torch.randint(0, 23, (9,)), 2 * torch.randn(9, 23)
    mixture = Mixture(weight, kind, temperature)
    logits = hidden @ matrix.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    naive, teacher = naive_mixture(logits, targets, teacher_logits, 4, mixture)
    expected = torch.autograd.grad(naive, [hidden, matrix])
    found = head_loss(hidden, matrix, targets, 4, teacher, mixture, cap)
    torch.testing.assert_close(found.total, naive)
    torch.testing.assert_close(torch.autograd.grad(found.total, [hidden, matrix]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient(kind: Divergence) -> None:
    torch.manual_seed(2)
    hidden, matrix = torch.randn(5, 6, requires_grad=True), torch.randn(17, 6)
    mixture = Mixture(1.0, kind)
    targets, logits = torch.zeros(5, dtype=torch.int64), (hidden @ matrix.T).detach()
    _, teacher = naive_mixture(logits, targets, logits, 3, mixture)
    found = head_loss(hidden, matrix, targets, 5, teacher, mixture, None)
    (gradient,) = torch.autograd.grad(found.total, [hidden])
    assert float(found.divergence) == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_divergence_by_hand() -> None:
    # Four equal logits; the teacher gives its one stored token 3/4. Student: 1/4 and 3/4. KL = 3/4 ln 3 + 1/4 ln(1/3).
    hidden, matrix = torch.zeros(1, 1, requires_grad=True), torch.ones(4, 1)
    teacher = Teacher(torch.tensor([[2]]), torch.log(torch.tensor([[0.75, 0.25]])))
    found = head_loss(hidden, matrix, torch.tensor([0]), 1, teacher, Mixture(0.5), None)
    assert float(found.divergence) == pytest.approx(0.5 * math.log(3))
    assert float(found.cross_entropy) == pytest.approx(math.log(4))
    assert float(found.total.detach()) == pytest.approx(0.5 * (0.5 * math.log(3) + math.log(4)))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_teacher_that_is_certain_spoils_nothing(kind: Divergence) -> None:
    # What float16 stores of a tail that is next to nothing, and of a mass that is all.
    hidden, matrix = torch.tensor([[40.0, 0.0]], requires_grad=True), torch.eye(2)
    teacher = Teacher(torch.tensor([[0]]), torch.tensor([[0.0, -65504.0]], dtype=torch.float16))
    found = head_loss(hidden, matrix, torch.tensor([0]), 1, teacher, Mixture(1.0, kind), None)
    (gradient,) = torch.autograd.grad(found.total, [hidden])
    assert torch.isfinite(found.total)
    assert torch.isfinite(gradient).all()


def test_no_gradient_is_worked_out_where_none_is_wanted() -> None:
    hidden, weight = torch.randn(3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with torch.no_grad():
        total = head_loss(hidden, weight, torch.tensor([0, 1, 2]), 2, None, PLAIN, None).total
    assert not total.requires_grad


def test_student_of_a_family_that_caps_its_logits() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=0.5)
    tokens = torch.randint(3, 64, (2, 6))
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORED)], 1)
    torch.testing.assert_close(loss_of(Student(model, PLAIN), tokens, targets), expected)


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
    loss = loss_of(Student(model, PLAIN), tokens, targets)
    found = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_nothing_to_train_on_is_zero_with_zero_gradients() -> None:
    model = tiny_llama()
    loss = loss_of(Student(model, PLAIN), torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
