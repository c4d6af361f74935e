"""How much memory the process that computes with a model has taken."""

import resource

import torch


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at most since this process began: resident (`memory_bytes`), and of a GPU what tensors took (`device_bytes`)."""
    found = {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        found["device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found
