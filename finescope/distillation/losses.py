"""Cross-entropy over the positions that are trained on, in chunks: the logits of a batch never exist whole."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Logits that exist at a time: 8 M values are 32 MiB in fp32, 170 positions of a vocabulary of 49,152. Measured on two
# cores: half as many cost a sixth more time, four times as many gain nothing.
CHUNK_LOGITS = 8 * 1024 * 1024


class ChunkedHead(nn.Module):
    """The output embedding together with its loss: hidden states in, summed cross-entropy out.

    A module that holds the weight itself, so that ZeRO-3 gathers it around the one place where it is used.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight  # [vocabulary, d_model], shared with the language model's own head

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of -log p(target) in nats, fp32, a scalar.

        hidden: [positions, d_model], only the positions that are trained on; targets: [positions], int64.
        """
        rows = max(1, CHUNK_LOGITS // self.weight.shape[0])
        return cross_entropy_sum(hidden, self.weight, targets, rows)


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """The sum over positions of -log softmax(hidden @ weight.T)[target], `chunk_rows` positions at a time.

    hidden: [positions, d_model]; weight: [vocabulary, d_model]; targets: [positions]. The gradients are worked out in
    the forward pass while a chunk's logits are there, so that backward neither keeps nor recomputes them; that of
    `weight` only where it is asked for.
    """
    return _CrossEntropySum.apply(hidden, weight, targets, chunk_rows)  # pyright: ignore[reportReturnType]


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        compute = _compute_dtype(hidden)
        matrix, states = weight.to(compute), hidden.to(compute)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(states) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for begin in range(0, len(targets), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            logits = functional.linear(states[rows], matrix).float()  # [rows, vocabulary]
            # Subtracted in place, so that one array serves as logits, log-probabilities and gradient.
            logits -= logits.logsumexp(-1, keepdim=True)
            total -= logits.gather(1, targets[rows, None]).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            gradient = logits.exp_()
            gradient[torch.arange(len(gradient), device=gradient.device), targets[rows]] -= 1.0
            gradient = gradient.to(compute)
            if hidden_grad is not None:
                torch.mm(gradient, matrix, out=hidden_grad[rows])
            if weight_grad is not None:
                _accumulate(weight_grad, gradient, states[rows])
        ctx.save_for_backward(
            hidden_grad.to(hidden.dtype) if hidden_grad is not None else None,
            weight_grad.to(weight.dtype) if weight_grad is not None else None,
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            hidden_grad * scale.to(hidden_grad.dtype) if hidden_grad is not None else None,
            weight_grad * scale.to(weight_grad.dtype) if weight_grad is not None else None,
            None,
            None,
        )


def _accumulate(weight_grad: Tensor, gradient: Tensor, states: Tensor) -> None:
    # [vocabulary, d_model] += [rows, vocabulary].T @ [rows, d_model]; in one call where no cast stands between.
    if gradient.dtype == weight_grad.dtype:
        weight_grad.addmm_(gradient.T, states)
    else:
        weight_grad += gradient.T @ states


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
