"""How much memory tensors take: a figure of the computation alone, the same on any device and whatever else the process holds."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Inside the context, counts the bytes of what operations make, while it is alive; a kernel's workspace is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0  # the most that were alive at once
        self._alive: dict[int, int] = {}  # bytes by the storage's address: views share one

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage._cdata not in given | self._alive.keys():
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata).atexit = False
        self.peak_bytes = max(self.peak_bytes, sum(self._alive.values()))
        return made


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters as they lie in memory; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
