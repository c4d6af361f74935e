"""The sparse autoencoder: z = act(W_enc (a - b_dec) + b_enc), a_hat = W_dec z + b_dec on chosen coordinates of a.

The pre-bias of the paper is tied to `b_dec`, as in Gao et al. (arXiv 2406.04093), so that SAELens
(apply_b_dec_to_input) and sparsify can hold the same weights. The standardisation of the coordinates is folded into
the weights: everything here takes raw activations.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

# topk: Gao et al. 2024 (2406.04093); batch_topk: Bussmann et al. 2024 (2412.06410); jumprelu: Rajamanoharan et al. 2024
# (2407.14435); relu_l1: the FineScope paper's.
Architecture = Literal["topk", "batch_topk", "jumprelu", "relu_l1"]


class SparseCode(NamedTuple):
    """The largest latents of each activation. A latent that is not active has value 0."""

    ids: Tensor  # [N, count] int64, by falling value
    values: Tensor  # [N, count] float32, >= 0


class ReconstructionError(NamedTuple):
    """Per activation, in standardised units; the FVU of any set is sum(error) / sum(total)."""

    error: Tensor  # [N] squared distance to the reconstruction
    total: Tensor  # [N] squared distance to the training mean


class SparseAutoencoder(nn.Module):
    """A trained autoencoder with everything that it needs to take activations as the model gives them.

    Shapes: L latents; C coordinates that the dictionary sees; J of the `d_in` coordinates of the activation are read.
    C = J but for a subspace (`basis`), where each of the C is a direction in the J.
    """

    encoder_weight: Tensor  # [L, C]
    encoder_bias: Tensor  # [L]
    decoder_weight: Tensor  # [L, C]: one row a latent; of unit norm after division by `scale`
    decoder_bias: Tensor  # [C]
    threshold: Tensor  # [L]: a latent is active above it; 0 but for jumprelu and batch_topk
    coordinates: Tensor  # [J] int64, sorted: which of the d_in coordinates are read
    mean: Tensor  # [C] of the training activations
    scale: Tensor  # [C] their standard deviation
    basis: Tensor | None  # [C, J], orthonormal rows; None: the coordinates themselves

    def __init__(self, weights: dict[str, Tensor], *, architecture: Architecture, k: int, d_in: int) -> None:
        """Take weights in raw units (see `fold`); `threshold` and `basis` may be left out.

        `k` is the number of active latents: of each activation (topk), on the average (batch_topk); else it is not used.
        """
        super().__init__()
        self.architecture: Architecture = architecture
        self.k = k
        self.d_in = d_in
        weights = {"threshold": torch.zeros_like(weights["encoder_bias"]), **weights}
        basis = weights.get("basis")
        latents, seen = weights["encoder_weight"].shape
        shapes = weight_shapes(latents, seen, None if basis is None else len(weights["coordinates"]))
        assert weights.keys() == shapes.keys(), (weights.keys(), shapes.keys())
        for name, shape in shapes.items():
            assert tuple(weights[name].shape) == shape, (name, tuple(weights[name].shape), shape)
            self.register_buffer(name, weights[name])
        if basis is None:
            self.register_buffer("basis", None)

    @property
    def num_latents(self) -> int:
        """L."""
        return self.encoder_weight.shape[0]

    def encode(self, activations: Tensor) -> Tensor:
        """[N, d_in] of any dtype -> [N, L] float32."""
        latents = self._pre_activations(activations)
        if self.architecture == "topk":
            values, ids = latents.topk(self.k, dim=-1)
            return torch.zeros_like(latents).scatter_(-1, ids, values)
        return latents

    def encode_sparse(self, activations: Tensor, count: int | None = None) -> SparseCode:
        """[N, d_in] -> the `count` largest latents of each row (topk: all k of them unless told otherwise)."""
        latents = self._pre_activations(activations)
        kept = min(count or self.k, self.k if self.architecture == "topk" else self.num_latents)
        values, ids = latents.topk(kept, dim=-1)
        return SparseCode(ids, values)

    def decode(self, latents: Tensor) -> Tensor:
        """[N, L] -> [N, C]: raw values of the coordinates."""
        return latents @ self.decoder_weight + self.decoder_bias

    def decode_sparse(self, code: SparseCode) -> Tensor:
        """A sparse code -> [N, C]: raw values of the coordinates."""
        summed = nn.functional.embedding_bag(code.ids, self.decoder_weight, per_sample_weights=code.values, mode="sum")
        return summed + self.decoder_bias

    def forward(self, activations: Tensor) -> Tensor:
        """[N, d_in] -> reconstruction [N, C] of the coordinates."""
        return self.decode(self.encode(activations))

    def splice(self, activations: Tensor) -> Tensor:
        """[N, d_in] -> [N, d_in], same dtype: what the dictionary sees is replaced by its reconstruction, the rest stays."""
        change = self(activations) - self.select(activations)  # [N, C]
        if self.basis is not None:
            change = change @ self.basis
        return activations.index_add(-1, self.coordinates, change.to(activations.dtype))

    def reconstruction_error(self, activations: Tensor, reconstruction: Tensor) -> ReconstructionError:
        """Of activations [N, d_in] and their reconstruction [N, C]."""
        chosen = self.select(activations)
        error = ((chosen - reconstruction) / self.scale).square().sum(-1)
        total = ((chosen - self.mean) / self.scale).square().sum(-1)
        return ReconstructionError(error, total)

    def standardised_decoder(self) -> Tensor:
        """[L, C] on the CPU: the decoder's rows in standardised coordinates, of unit norm where training ended."""
        return (self.decoder_weight / self.scale).detach().float().cpu()

    def select(self, activations: Tensor) -> Tensor:
        """[N, d_in] -> [N, C] float32: what the dictionary sees."""
        return select(activations, self.coordinates, self.basis)

    def _pre_activations(self, activations: Tensor) -> Tensor:
        centred = self.select(activations) - self.decoder_bias
        latents = torch.relu(nn.functional.linear(centred, self.encoder_weight, self.encoder_bias))
        if self.architecture in ("jumprelu", "batch_topk"):
            latents = torch.where(latents > self.threshold, latents, torch.zeros_like(latents))
        return latents


def select(activations: Tensor, coordinates: Tensor, basis: Tensor | None) -> Tensor:
    """[N, d_in] -> [N, C] float32: the coordinates (int64 [J]), or their parts along the rows of `basis` [C, J]."""
    chosen = activations.index_select(-1, coordinates).float()
    return chosen if basis is None else chosen @ basis.T


def weight_shapes(num_latents: int, num_coordinates: int, basis_of: int | None = None) -> dict[str, tuple[int, ...]]:
    """The tensors of an autoencoder and their shapes; `basis_of`: J, where there is a basis."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder_weight": (num_latents, num_coordinates),
        "encoder_bias": (num_latents,),
        "decoder_weight": (num_latents, num_coordinates),
        "decoder_bias": (num_coordinates,),
        "threshold": (num_latents,),
        "coordinates": (num_coordinates if basis_of is None else basis_of,),
        "mean": (num_coordinates,),
        "scale": (num_coordinates,),
    }
    return shapes if basis_of is None else {**shapes, "basis": (num_coordinates, basis_of)}


def fold(
    encoder_weight: Tensor, encoder_bias: Tensor, decoder_weight: Tensor, decoder_bias: Tensor, mean: Tensor, scale: Tensor
) -> dict[str, Tensor]:
    """Weights that work on standardised coordinates (a - mean) / scale -> weights that give the same codes on raw ones.

    Args:
        encoder_weight, decoder_weight: [L, C]; encoder_bias: [L]; decoder_bias, mean, scale: [C].
    """
    return {
        "encoder_weight": encoder_weight / scale,
        "encoder_bias": encoder_bias,
        "decoder_weight": decoder_weight * scale,
        "decoder_bias": mean + scale * decoder_bias,
        "mean": mean,
        "scale": scale,
    }
