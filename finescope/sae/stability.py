"""How alike the latents of two dictionaries are: what another seed would have found as well."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.naming import SHARED_COSINE

# Cosines that exist at a time are at most the square of it: 64 MiB in float32.
_BLOCK_LATENTS = 4096


class Stability(NamedTuple):
    """Of two dictionaries; the same whichever is named first."""

    cosine: float  # mean over latents of the largest cosine to any latent of the other, both ways averaged
    shared: float  # share of latents whose largest cosine is above SHARED_COSINE, both ways averaged


@torch.no_grad()
def stability(first: SparseAutoencoder, second: SparseAutoencoder) -> Stability:
    """Compare two dictionaries of the same hook point by their decoder rows, each in its own standardised units.

    This is the mean max cosine similarity of Sharkey et al. 2022 ("Taking features out of superposition with sparse
    autoencoders"). Several latents may share a nearest one; Paulo and Belrose 2025 (arXiv 2501.16615) match one to one, which
    is stricter and takes all cosines at once. Dead latents count: they are near nothing but by chance, and what chance
    gives grows as the coordinates get fewer. A coordinate that one of the two does not see counts as zero there.
    """
    coordinates = torch.cat([first.coordinates, second.coordinates.to(first.coordinates.device)]).unique()
    rows, others = _directions(first, coordinates), _directions(second, coordinates)
    best, best_of_others = rows.new_full((len(rows),), -1.0), rows.new_full((len(others),), -1.0)
    for start in range(0, len(rows), _BLOCK_LATENTS):
        here = slice(start, start + _BLOCK_LATENTS)
        for other_start in range(0, len(others), _BLOCK_LATENTS):
            there = slice(other_start, other_start + _BLOCK_LATENTS)
            cosines = rows[here] @ others[there].T
            best[here] = torch.maximum(best[here], cosines.amax(1))
            best_of_others[there] = torch.maximum(best_of_others[there], cosines.amax(0))
    both = (best.double(), best_of_others.double())
    shared = [float((found > SHARED_COSINE).double().mean()) for found in both]
    return Stability(sum(float(found.mean()) for found in both) / 2, sum(shared) / 2)


def _directions(autoencoder: SparseAutoencoder, coordinates: Tensor) -> Tensor:
    """Unit-norm decoder rows [L, J] in standardised units, laid out on `coordinates` (int64 [J], sorted)."""
    rows = autoencoder.decoder_weight / autoencoder.scale
    if autoencoder.basis is not None:
        rows = rows @ autoencoder.basis
    rows = rows.to(coordinates.device)
    places = torch.searchsorted(coordinates, autoencoder.coordinates.to(coordinates.device))
    laid = rows.new_zeros(len(rows), len(coordinates)).index_copy(1, places, rows)
    return functional.normalize(laid, dim=1)
