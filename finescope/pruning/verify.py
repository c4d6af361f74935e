"""Proof that a saved directory is the model whose blocks were in memory: loaded in a fresh process, by stock classes."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from finescope.errors import StepFailed
from finescope.processes import available_memory
from finescope.pruning import reload_check
from finescope.pruning.probe import Case

# Largest difference of logits over the largest logit: float error of the dtype that the forward pass runs in.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Behind a cache other kernels run, in another order, and a router may choose another expert. A wrong cache is off by far more.
_CACHED = 10
_PROCESS = 1_500_000_000  # bytes: the libraries in a process of their own, activations, logits
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_GENERATED = 4


class Verified(NamedTuple):
    """What the fresh process found."""

    architecture: str  # class of transformers that loaded the directory
    difference: float  # largest difference of logits over the largest logit
    cached: float  # norm of the difference behind a cache over the logits' own
    num_generated: int  # tokens that generate() made


def verify_saved(directory: Path, dtype: torch.dtype, device: torch.device, cases: Sequence[Case]) -> Verified:
    """Load `directory` in a fresh process without finescope and compare what it computes with `cases`.

    Each case is one forward pass; the longest is also decoded token by token behind a cache. What of a model memory cannot hold
    stays on disk and is read a part at a time.

    Raises:
        StepFailed: not a stock architecture, weights other than safetensors or that do not fit, other logits, no generation.
    """
    architecture = _stock_architecture(directory)
    _only_safetensors(directory)
    answer = _in_fresh_process(directory, device.type, _memory_limit(directory, device), cases)
    if answer["keys"]:
        raise StepFailed(f"{directory}: weights do not fit {architecture}: {', '.join(answer['keys'][:5])}")
    if answer["dtype"] != str(dtype) or answer["architecture"] != architecture:
        raise StepFailed(f"{directory}: loaded as {answer['architecture']} {answer['dtype']}, expected {architecture} {dtype}")
    if answer["difference"] is None:
        expected = cases[0].logits.shape[-1]
        raise StepFailed(f"{directory}: logits over {answer['vocabulary']} tokens after reloading, {expected} in memory")
    difference, tolerance = answer["difference"] / (answer["largest"] or 1.0), TOLERANCE[dtype]
    if not difference <= tolerance:
        raise StepFailed(
            f"{directory}: logits differ by {answer['difference']:.3g} after reloading, {difference:.3g} of the largest "
            f"({answer['largest']:.3g}); at most {tolerance:.0e} is expected"
        )
    if not answer["cached"] <= _CACHED * tolerance:
        raise StepFailed(
            f"{directory}: decoded behind a cache, logits differ by {answer['cached']:.3g} of their size; "
            f"at most {_CACHED * tolerance:.0e} is expected"
        )
    if answer["generated"] != _GENERATED:
        raise StepFailed(f"{directory}: generate() made {answer['generated']} tokens of {_GENERATED}")
    return Verified(architecture, difference, answer["cached"], answer["generated"])


def _memory_limit(directory: Path, device: torch.device) -> int:
    """Bytes of this machine that the weights may take, where not all of them fit where they should run; -1: they do."""
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    available = available_memory()
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available
    if available is None or room is None or weights + _PROCESS <= room:
        return -1
    return max(0, available - _PROCESS) // 2


def _stock_architecture(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or not hasattr(transformers, architectures[0]) or "auto_map" in config:
        raise StepFailed(f"{directory / 'config.json'}: architectures {architectures} is not one class of transformers")
    return architectures[0]


def _only_safetensors(directory: Path) -> None:
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles or not any(name.endswith(".safetensors") for name in names):
        raise StepFailed(f"{directory}: weights must be safetensors and nothing else, found {', '.join(pickles or names)}")


def _in_fresh_process(directory: Path, device: str, memory: int, cases: Sequence[Case]) -> dict[str, Any]:
    given = io.BytesIO()
    arrays = {f"{name}_{number}": value for number, case in enumerate(cases) for name, value in case._asdict().items()}
    np.savez(given, directory=np.array(str(directory)), device=np.array(device), memory=np.array(memory), **arrays)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    # -P: the script's own folder is not a place to import from.
    process = subprocess.run(
        [sys.executable, "-P", str(Path(reload_check.__file__))],
        input=given.getvalue(),
        capture_output=True,
        env=environment,
        check=False,
    )
    if process.returncode:
        tail = process.stderr.decode(errors="replace").strip().splitlines()[-8:]
        raise StepFailed(f"{directory}: a fresh process could not load it (exit {process.returncode}):\n" + "\n".join(tail))
    return json.loads(process.stdout.decode().strip().splitlines()[-1])
