"""The loss of a training, in chunks of positions: the logits of a batch never exist whole.

Cross-entropy with the tokens of the text, mixed with a divergence from the teacher's distribution where that is given. The
teacher's k most likely tokens and all others together are k + 1 outcomes, and so are the student's: no mass is missing, and the
divergence is at most that of the whole distributions.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# Logits that exist at a time: 8 M values are 32 MiB in fp32, 170 positions of a vocabulary of 49,152. Measured on two
# cores: half as many cost a sixth more time, four times as many gain nothing.
CHUNK_LOGITS = 8 * 1024 * 1024
# Least log-probability of an outcome: what float16 cannot tell from never is as likely as this.
_LEAST = -40.0

Divergence = Literal["forward", "reverse", "jensen_shannon"]


@dataclass(frozen=True)
class Mixture:
    """How the divergence from the teacher stands beside the cross-entropy: (1 - weight) * CE + weight * T^2 * divergence.

    T^2 keeps the size of the gradient as T changes (Hinton et al. 2015, section 2).
    """

    weight: float
    divergence: Divergence = "forward"  # KL(teacher || student), KL(student || teacher), or Jensen-Shannon
    temperature: float = 1.0  # T: both distributions' logits are divided by it


class Teacher(NamedTuple):
    """The teacher's distribution at each position that is trained on, at the mixture's temperature."""

    ids: Tensor  # [positions, k] int64, its most likely tokens
    logprobs: Tensor  # [positions, k + 1] fp32: theirs, and that of all other tokens together


class HeadLoss(NamedTuple):
    """Sums over positions, scalars in nats, fp32; only the first has a gradient."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor  # without weight and T^2


class ChunkedHead(nn.Module):
    """The output embedding together with the loss: hidden states in, sums over positions out.

    A module that holds the weight itself, so that ZeRO-3 gathers it around the one place where it is used.
    """

    def __init__(self, weight: nn.Parameter, mixture: Mixture, cap: float | None):
        """`cap`: of Gemma 2, logits z become cap * tanh(z / cap)."""
        super().__init__()
        self.weight = weight  # [vocabulary, d_model], shared with the language model's own head
        self._mixture, self._cap = mixture, cap

    def forward(self, hidden: Tensor, targets: Tensor, teacher: Teacher | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [positions, d_model], only the positions that are trained on; targets: [positions], int64."""
        rows = max(1, CHUNK_LOGITS // self.weight.shape[0])
        loss = head_loss(hidden, self.weight, targets, rows, teacher, self._mixture, self._cap)
        return loss.total, loss.cross_entropy, loss.divergence


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, teacher: Teacher | None, mixture: Mixture, cap: float | None
) -> HeadLoss:
    """The loss of logits hidden @ weight.T, `chunk_rows` positions at a time.

    hidden: [positions, d_model]; weight: [vocabulary, d_model]; targets: [positions]. The gradients are worked out in
    the forward pass while a chunk's logits are there, so that backward neither keeps nor recomputes them; that of
    `weight` only where it is asked for. Without a teacher it is the cross-entropy alone.
    """
    given = (None, None) if teacher is None else (teacher.ids, _normalised(teacher.logprobs))
    mixture = mixture if teacher is not None else Mixture(0.0)
    settings = _Settings(chunk_rows, mixture, cap, torch.is_grad_enabled())
    return HeadLoss(*_HeadLoss.apply(hidden, weight, targets, *given, settings))  # pyright: ignore[reportGeneralTypeIssues]


class _Settings(NamedTuple):
    chunk_rows: int
    mixture: Mixture
    cap: float | None
    gradients: bool


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ids: Tensor | None,
        logprobs: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (wanted and settings.gradients for wanted in ctx.needs_input_grad[:2])
        compute = _compute_dtype(hidden)
        matrix, states = weight.to(compute), hidden.to(compute)
        mixture, cap = settings.mixture, settings.cap
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)  # cross-entropy, divergence
        hidden_grad = torch.empty_like(states) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for begin in range(0, len(targets), settings.chunk_rows):
            rows = slice(begin, begin + settings.chunk_rows)
            logits = functional.linear(states[rows], matrix).float()  # [rows, vocabulary]
            if cap is not None:
                logits = logits.div_(cap).tanh_().mul_(cap)
            slope = None if cap is None or not settings.gradients else 1.0 - (logits / cap) ** 2
            told = None if ids is None or logprobs is None else Teacher(ids[rows], logprobs[rows])
            gradient = _chunk(logits, targets[rows], told, mixture, sums)
            if hidden_grad is None and weight_grad is None:
                continue
            gradient = (gradient if slope is None else gradient.mul_(slope)).to(compute)
            if hidden_grad is not None:
                torch.mm(gradient, matrix, out=hidden_grad[rows])
            if weight_grad is not None:
                _accumulate(weight_grad, gradient, states[rows])
        ctx.save_for_backward(
            hidden_grad.to(hidden.dtype) if hidden_grad is not None else None,
            weight_grad.to(weight.dtype) if weight_grad is not None else None,
        )
        cross_entropy, divergence = sums.unbind()
        total = (1.0 - mixture.weight) * cross_entropy + mixture.weight * mixture.temperature**2 * divergence
        parts = cross_entropy.clone(), divergence.clone()
        ctx.mark_non_differentiable(*parts)
        return total, *parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            hidden_grad * scale.to(hidden_grad.dtype) if hidden_grad is not None else None,
            weight_grad * scale.to(weight_grad.dtype) if weight_grad is not None else None,
            *(None,) * 4,
        )


def _chunk(logits: Tensor, targets: Tensor, teacher: Teacher | None, mixture: Mixture, sums: Tensor) -> Tensor:
    """Add a chunk's cross-entropy and divergence to `sums`; returns the gradient of the mixture for its logits, in their place.

    logits: [rows, vocabulary] fp32, given up. With q = softmax(z / T), outcomes b = the k tokens of the teacher and all others
    together, b(j) the one that token j is of, and h_b = dD/d(log q_b): as the mass of an outcome changes as that of its tokens
    does, dD/dz_j = q_j / T * (h_b(j) / q_b(j) - sum_b h_b).
    """
    # Subtracted in place, so that one array serves as logits, log-probabilities and gradient.
    logits -= logits.logsumexp(-1, keepdim=True)
    lines = torch.arange(len(logits), device=logits.device)
    sums[0] -= logits[lines, targets].sum()
    if teacher is None:
        gradient = logits.exp_()
        gradient[lines, targets] -= 1.0
        return gradient
    weight, temperature = mixture.weight, mixture.temperature
    log_q = logits if temperature == 1.0 else functional.log_softmax(logits / temperature, -1)
    of_tokens = log_q.gather(1, teacher.ids)  # [rows, k]
    q = log_q.exp_()
    # Summed without the k and not as what they leave of 1, which rounding would spoil where they are nearly all.
    others = q.scatter_(1, teacher.ids, 0.0).sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    outcomes = torch.cat([of_tokens, others.log()], 1)  # [rows, k + 1], log
    value, slopes = _divergence(teacher.logprobs, outcomes.clamp_min(_LEAST), mixture.divergence)
    sums[1] += value.sum()
    all_slopes = slopes.sum(1, keepdim=True)
    scale = weight * temperature  # T^2 of the mixture, 1 / T of the derivative
    of_tokens = of_tokens.exp_()
    at_tokens = scale * (slopes[:, :-1] - of_tokens * all_slopes)
    elsewhere = scale * (slopes[:, -1:] / others - all_slopes)  # per unit of q
    if temperature == 1.0:
        at_tokens += (1.0 - weight) * of_tokens
        gradient = q.mul_(elsewhere + (1.0 - weight))
        gradient.scatter_(1, teacher.ids, at_tokens)
    else:
        gradient = logits.exp_().mul_(1.0 - weight).add_(q.mul_(elsewhere))
        gradient.scatter_add_(1, teacher.ids, at_tokens)
    gradient[lines, targets] -= 1.0 - weight
    return gradient


def _divergence(log_p: Tensor, log_q: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence of two distributions over outcomes, [rows], and its derivative for log q, [rows, outcomes].

    log_p is the teacher's, log_q the student's, both [rows, outcomes].
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return (p * (log_p - log_q)).sum(1), -p
    if kind == "reverse":
        return (q * (log_q - log_p)).sum(1), q * (log_q - log_p + 1.0)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    value = 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(1)
    return value, 0.5 * q * (log_q - log_m)


def _normalised(logprobs: Tensor) -> Tensor:
    """Log-probabilities that were stored in half precision, so that they are of a distribution again."""
    return logprobs.float().clamp_min(_LEAST).log_softmax(-1)


def _accumulate(weight_grad: Tensor, gradient: Tensor, states: Tensor) -> None:
    # [vocabulary, d_model] += [rows, vocabulary].T @ [rows, d_model]; in one call where no cast stands between.
    if gradient.dtype == weight_grad.dtype:
        weight_grad.addmm_(gradient.T, states)
    else:
        weight_grad += gradient.T @ states


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
