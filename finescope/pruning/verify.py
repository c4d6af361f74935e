"""Proof that a saved directory is the model that was in memory: loaded in a fresh process, by stock classes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from finescope.errors import StepFailed
from finescope.pruning import reload_check

# Largest difference of logits over the largest logit: float error of the dtype that the forward pass runs in.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_GENERATED = 4


class Verified(NamedTuple):
    """What the fresh process found."""

    architecture: str  # class of transformers that loaded the directory
    difference: float  # largest difference of logits over the largest logit
    num_generated: int  # tokens that generate() made


def verify_saved(directory: Path, student: PreTrainedModel, input_ids: Tensor) -> Verified:
    """Load `directory` in a fresh process without finescope and compare its logits on `input_ids` int64 [documents, tokens].

    Raises:
        StepFailed: not a stock architecture, weights other than safetensors or that do not fit, other logits, no generation.
    """
    architecture = _stock_architecture(directory)
    _only_safetensors(directory)
    with torch.no_grad():
        logits = student(input_ids=input_ids.to(student.device), use_cache=False).logits.float().cpu().numpy()
    answer = _in_fresh_process(directory, student.device.type, input_ids.cpu().numpy(), logits)
    if answer["keys"]:
        raise StepFailed(f"{directory}: weights do not fit {architecture}: {', '.join(answer['keys'][:5])}")
    if answer["dtype"] != str(student.dtype) or answer["architecture"] != architecture:
        raise StepFailed(
            f"{directory}: loaded as {answer['architecture']} {answer['dtype']}, expected {architecture} {student.dtype}"
        )
    if answer["difference"] is None:
        raise StepFailed(f"{directory}: logits of shape {answer['shape']} after reloading, {list(logits.shape)} in memory")
    difference, tolerance = answer["difference"] / (answer["largest"] or 1.0), TOLERANCE[student.dtype]
    if not difference <= tolerance:
        raise StepFailed(
            f"{directory}: logits differ by {answer['difference']:.3g} after reloading, {difference:.3g} of the largest "
            f"({answer['largest']:.3g}); at most {tolerance:.0e} is expected"
        )
    if answer["generated"] != _GENERATED:
        raise StepFailed(f"{directory}: generate() made {answer['generated']} tokens of {_GENERATED}")
    return Verified(architecture, difference, answer["generated"])


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


def _in_fresh_process(directory: Path, device: str, input_ids: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    given = io.BytesIO()
    np.savez(given, directory=np.array(str(directory)), device=np.array(device), input_ids=input_ids, logits=logits)
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
