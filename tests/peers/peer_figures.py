"""The comparison of two codes, and a line with the figure of it at the end of the run."""

import torch
from torch import Tensor

FIGURES: list[tuple[str, float, float]] = []


def agree(name: str, found: Tensor, expected: Tensor) -> None:
    """Codes [N, L] of the same activations: within 1e-5 of each other, and the same latents active."""
    difference = (found.float() - expected.float()).abs().max().item()
    largest = expected.abs().max().item()
    FIGURES.append((name, difference, largest))
    assert (expected > 0).any(), name
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")
