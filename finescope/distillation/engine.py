"""What the training loop asks of whatever holds the weights, and the plain engine that does it with torch alone."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

STATE_FILE = "state.safetensors"
# AdamW's, as torch has them; named because every engine must use the same.
BETAS, EPSILON = (0.9, 0.999), 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and the clipping before it."""

    weight_decay: float
    max_grad_norm: float  # the gradient is scaled down to this L2 norm, over all trainable weights
    # What an engine that shards keeps in the CPU's memory: "optimizer" its state and master weights, "all" the weights too.
    offload: Literal["none", "optimizer", "all"] = "none"


# Tokens, targets and positions of a batch, and what the teacher says at its targets: see `Student.forward`.
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Sums = tuple[Tensor, Tensor, Tensor]  # as `losses.HeadLoss`, and no named tuple: ZeRO takes apart what modules return


class Engine(Protocol):
    """One process of a group that trains a module together. Every method is called by all processes, in the same order.

    The module maps `Inputs` to `Sums`. A checkpoint says nothing of the number of processes or of how the weights are split, so
    that any engine reads any other's.
    """

    rank: int
    world_size: int
    device: torch.device

    def __call__(self, *inputs: Tensor | None) -> Sums:
        """The module's loss, with a graph behind the first sum where gradients are wanted."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the loss's gradients to those of the step; `last`: `step` comes next."""
        ...

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over the processes, clip, update, clear; returns the norm before clipping.

        A norm that is not finite means that nothing was updated.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write trainable weights and optimiser state to a local directory; only rank 0 writes."""
        ...

    def load(self, directory: Path) -> None:
        """Read what `save` wrote. Every rank reads."""
        ...

    def trainable(self) -> dict[str, Tensor]:
        """The trainable weights by name, whole, fp32, on the CPU; on other ranks than 0 an empty dict."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""
        ...


EngineFactory = Callable[[nn.Module, OptimizerSettings], Engine]


class PlainEngine:
    """Plain torch: AdamW on whole weights; with a process group, gradients are summed over its processes.

    fp32 on a CPU; on a GPU bf16 autocast over fp32 trainable weights.
    """

    def __init__(self, module: nn.Module, settings: OptimizerSettings):
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if grouped else 0
        self.world_size = distributed.get_world_size() if grouped else 1
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._module = module.to(self.device)
        self._max_grad_norm = settings.max_grad_norm
        self._weights = trainable_parameters(module)
        self._optimizer = adamw(self._weights.values(), settings)

    def __call__(self, *inputs: Tensor | None) -> Sums:
        """See `Engine`."""
        with self._autocast():
            return self._module(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """See `Engine`."""
        gradients = [weight.grad for weight in self._weights.values() if weight.grad is not None]
        if self.world_size > 1:
            # A weight without a gradient on one process may have one on another; all take part with the same shapes.
            gradients = [_gradient(weight) for weight in self._weights.values()]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm))
        if finite:
            torch.nn.utils.clip_grads_with_norm_(self._weights.values(), self._max_grad_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def save(self, directory: Path) -> None:
        """See `Engine`."""
        if self.rank == 0:
            states = {name: self._optimizer.state.get(weight, {}) for name, weight in self._weights.items()}
            updates = max((int(state["step"]) for state in states.values() if state), default=0)
            moments = {name: {key: state[key] for key in MOMENTS} for name, state in states.items() if state}
            save_state(directory, self.trainable(), moments, updates)

    def load(self, directory: Path) -> None:
        """See `Engine`."""
        values, moments, updates = load_state(directory)
        assert values.keys() == self._weights.keys(), "the checkpoint is of other weights"
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(values[name])
                if name in moments:
                    state = {key: moment.to(self.device) for key, moment in moments[name].items()}
                    self._optimizer.state[weight] = {"step": torch.tensor(float(updates)), **state}

    def trainable(self) -> dict[str, Tensor]:
        """See `Engine`."""
        if self.rank != 0:
            return {}
        return {name: weight.detach().float().cpu().clone() for name, weight in self._weights.items()}

    def sum(self, values: Sequence[float]) -> list[float]:
        """See `Engine`."""
        return sum_over_processes(values, self.device) if self.world_size > 1 else list(values)

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            yield


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ask for a gradient, by name; a shared one once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """The optimiser of every engine. Its learning rate is set anew at each step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=settings.weight_decay)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over the default process group, in fp64."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    distributed.all_reduce(tensor)
    return tensor.tolist()


def save_state(directory: Path, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], updates: int) -> None:
    """Write weights, Adam's moments and the number of updates made so far as one file of fp32 tensors."""
    tensors = {f"weight/{name}": tensor for name, tensor in weights.items()}
    for name, state in moments.items():
        tensors.update({f"{key}/{name}": state[key].detach().float().cpu().contiguous() for key in MOMENTS})
    tensors["updates"] = torch.tensor(updates, dtype=torch.int64)
    save_file(tensors, str(directory / STATE_FILE))


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], int]:
    """What `save_state` wrote: weights, moments by weight, updates."""
    tensors = load_file(str(directory / STATE_FILE))
    updates = int(tensors.pop("updates"))
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        if kind == "weight":
            weights[name] = tensor
        else:
            moments.setdefault(name, {})[kind] = tensor
    return weights, moments, updates


def _gradient(weight: nn.Parameter) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
