"""The training engine on DeepSpeed ZeRO, stages 1 to 3."""

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from finescope.distillation.engine import (
    MOMENTS,
    OptimizerSettings,
    Sums,
    adamw,
    load_state,
    save_state,
    sum_over_processes,
    trainable_parameters,
)
from finescope.errors import ResourceError


class DeepSpeedEngine:
    """An `Engine` (see finescope.distillation.engine) whose optimiser states, gradients and weights are split over ranks.

    bf16 with fp32 master weights on GPUs, fp32 on CPUs. Its checkpoints are those of the plain engine, gathered on rank 0.
    DeepSpeed starts at the first use: weights that `load` brings are then in the module before it is split.
    """

    def __init__(self, zero_stage: int, module: nn.Module, settings: OptimizerSettings) -> None:
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._stage, self._settings = zero_stage, settings
        self._module = module.to(self.device)
        self._weights = trainable_parameters(module)
        self._adamw = adamw(self._weights.values(), settings)
        self._restored: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], int] | None = None
        self._updates = 0  # optimiser updates made, over all attempts
        self._started: Any = None

    def __call__(self, *inputs: Tensor | None) -> Sums:
        """See `Engine`."""
        return self._deepspeed()(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        engine = self._deepspeed()
        engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the ranks; the loss is already a share of the whole batch's.
        engine.backward(loss * self.world_size)

    def step(self, learning_rate: float) -> float:
        """See `Engine`."""
        engine = self._deepspeed()
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        engine.step()
        if engine.optimizer.overflow:
            return float("nan")
        self._updates += 1
        return float(engine.get_global_grad_norm())

    def save(self, directory: Path) -> None:
        """See `Engine`."""
        tensors = _module("deepspeed.utils")
        weights, moments = self.trainable(), {}
        for name, weight in self._weights.items() if self._updates else ():
            state = {key: tensors.safe_get_full_optimizer_state(weight, key) for key in MOMENTS}
            if self.rank == 0:
                moments[name] = {key: moment.cpu() for key, moment in state.items()}
        if self.rank == 0:
            save_state(directory, weights, moments, self._updates)

    def load(self, directory: Path) -> None:
        """See `Engine`."""
        assert self._started is None, "a checkpoint is loaded before the first step"
        self._restored = load_state(directory)
        assert self._restored[0].keys() == self._weights.keys(), "the checkpoint is of other weights"
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._restored[0][name])

    def trainable(self) -> dict[str, Tensor]:
        """See `Engine`."""
        self._deepspeed()
        tensors, gathered = _module("deepspeed.utils"), {}
        for name, weight in self._weights.items():
            whole = tensors.safe_get_full_fp32_param(weight)
            if self.rank == 0:
                gathered[name] = whole.detach().float().cpu().clone()
        return gathered

    def sum(self, values: Sequence[float]) -> list[float]:
        """See `Engine`."""
        return sum_over_processes(values, self.device)

    def _deepspeed(self) -> Any:
        if self._started is None:
            self._started = self._start()
        return self._started

    def _start(self) -> Any:
        deepspeed = _module("deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        on_gpu = self.device.type == "cuda"
        if not on_gpu:
            # A kernel for inference that every fresh machine would compile first, if it has a compiler; a process killed
            # meanwhile leaves a lock behind that the next one waits for without end. gloo does all that training needs.
            _module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
        config = {
            # What DeepSpeed wants to know; how many documents a pass really has is the loop's affair.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._settings.max_grad_norm,
            "zero_optimization": {"stage": self._stage, **self._offload()},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": on_gpu},
            "steps_per_print": 2**31,
        }
        engine, *_ = deepspeed.initialize(model=self._module, optimizer=self._adamw, config=config, dist_init_required=False)
        # Off by default in fp32, where a gradient that is not finite would go into the weights.
        engine.optimizer.check_grad_overflow = True
        engine.optimizer.overflow = False
        if self._restored is not None:
            self._restore(engine.optimizer, *self._restored)
            self._restored = None
        return engine

    def _offload(self) -> dict[str, Any]:
        wanted, place = self._settings.offload, {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            **({"offload_optimizer": place} if wanted != "none" else {}),
            **({"offload_param": place} if wanted == "all" else {}),
        }

    def _restore(self, optimizer: Any, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Put back the fp32 master weights, which are finer than the bf16 ones of the module, and Adam's moments."""
        tensors = _module("deepspeed.utils")
        for name, weight in self._weights.items():
            tensors.safe_set_full_fp32_param(weight, weights[name].to(self.device))
        self._updates = updates
        if not updates:
            return
        # The states would come into being in the first step; the setters need them now.
        flat = optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        for partition in flat:
            zeros = {key: torch.zeros_like(partition) for key in MOMENTS}
            self._adamw.state[partition] = {"step": torch.tensor(float(updates)), **zeros}
        if self._stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, weight in self._weights.items():
            for key in MOMENTS:
                tensors.safe_set_full_optimizer_state(weight, moments[name][key].to(self.device), key)


def check_installed() -> None:
    """Hold the machine to what ZeRO needs.

    Raises:
        ResourceError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ResourceError(
            "distill.zero_stage 1 to 3 needs DeepSpeed, which is not installed: pip install 'finescope[deepspeed]', or set "
            "distill.zero_stage to 0"
        )


def _module(name: str) -> Any:
    # An optional package, imported where it is used: its import takes seconds and looks for an accelerator.
    return importlib.import_module(name)
