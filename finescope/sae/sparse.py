"""Products with sparse codes: what an active latent costs, and nothing for the others, forward and backward.

A step of a TopK dictionary has one dense product, the encoder's, which finds the active latents. Everything after it
touches k of L rows an activation (Gao et al., arXiv 2406.04093, appendix on kernels). The three products that are
needed are torch's own kernels on CPU and GPU alike: an embedding bag over the latents of an activation, an embedding bag
over the activations of a latent (the same entries sorted by latent), and a sampled matrix product.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

# Share of all entries above which dense products are faster, measured on CPUs.
_DENSE_SHARE = 0.25
# Dense products are padded to whole tiles: at a ragged edge the order of a sum depends on how the threads split the matrix.
_TILE = 64


class Pattern:
    """Which latents are active on which activation: M entries, row by row.

    Shapes: N activations, L latents, C coordinates.
    """

    def __init__(self, ids: Tensor, offsets: Tensor, num_latents: int) -> None:
        """Take the latents `ids` int64 [M] and where each row's begin, `offsets` int64 [N + 1]."""
        self.ids, self.offsets, self.num_latents = ids, offsets, num_latents
        self._sorted: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.offsets) - 1

    def rows(self) -> Tensor:
        """The activation of each entry, int64 [M]."""
        numbers = torch.arange(self.num_rows, device=self.ids.device)
        return numbers.repeat_interleave(self.offsets.diff(), output_size=len(self.ids))

    def mix(self, values: Tensor, latents: Tensor) -> Tensor:
        """[N, C]: for each activation the sum of the rows of `latents` [L, C], weighted by `values` [M]."""
        if self._mostly_full():
            rows, columns = latents.shape
            padded = functional.pad(latents, (0, -columns % _TILE, 0, -rows % _TILE))
            return (self._dense(values) @ padded)[:, :columns]
        return _bags(self.ids, latents, self.offsets, values)

    def collect(self, values: Tensor, activations: Tensor) -> Tensor:
        """[L, C]: for each latent the sum of the rows of `activations` [N, C], weighted by `values` [M]."""
        if self._mostly_full():
            padded = functional.pad(activations, (0, -activations.shape[1] % _TILE))
            return (self._dense(values).T @ padded)[: self.num_latents, : activations.shape[1]]
        order, rows, starts = self._by_latent()
        return _bags(rows, activations, starts, values[order])

    def products(self, activations: Tensor, latents: Tensor) -> Tensor:
        """[M]: the scalar product of each entry's row of `activations` [N, C] with its row of `latents` [L, C]."""
        if self._mostly_full():
            padded = functional.pad(latents, (0, 0, 0, -len(latents) % _TILE))
            return (activations @ padded.T)[self.rows(), self.ids]
        shape = (self.num_rows, self.num_latents)
        entries = _compressed(self.offsets, self.ids, activations.new_zeros(len(self.ids)), shape)
        return torch.sparse.sampled_addmm(entries, activations, latents.T, beta=0.0).values()

    def _mostly_full(self) -> bool:
        return len(self.ids) > _DENSE_SHARE * self.num_rows * self.num_latents

    def _dense(self, values: Tensor) -> Tensor:
        """[N, L rounded up to whole tiles] with the entries' values, zero elsewhere."""
        columns = self.num_latents + -self.num_latents % _TILE
        return values.new_zeros(self.num_rows, columns).index_put_((self.rows(), self.ids), values)

    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries by latent, of one latent by row: their order [M], their rows [M], where each latent's begin [L + 1]."""
        if self._sorted is None:
            small = self.ids.to(torch.int16 if self.num_latents < 2**15 else torch.int32)  # sorts faster
            ids, order = small.sort(stable=True)
            # Where each latent's entries begin; bincount would make a GPU wait.
            starts = torch.searchsorted(ids, torch.arange(self.num_latents + 1, device=ids.device, dtype=torch.int32))
            self._sorted = order, self.rows()[order], starts
        return self._sorted


def rows_of(ids: Tensor, num_latents: int) -> Pattern:
    """The pattern of as many entries in every row: `ids` int64 [N, k]."""
    rows, k = ids.shape
    offsets = torch.arange(0, rows * k + 1, k, device=ids.device)
    return Pattern(ids.flatten(), offsets, num_latents)


def encode_at(
    pattern: Pattern, centred: Tensor, encoder_weight: Tensor, encoder_bias: Tensor, decoder_bias: Tensor, pre: Tensor | None
) -> Tensor:
    """Pre-activations [M] of the entries of `pattern`, with gradients for encoder and pre-bias.

    Args:
        centred: [N, C], the activations less `decoder_bias` [C], without a graph.
        pre: [M], if they are known already (they are the values of the dense product); None: computed here.
    """
    values: Any = _EncodeAt.apply(encoder_weight, encoder_bias, decoder_bias, centred, pattern, pre)
    return values


def decode_at(pattern: Pattern, values: Tensor, decoder_weight: Tensor) -> Tensor:
    """[N, C]: sums of decoder rows [L, C] weighted by `values` [M], with gradients for both."""
    mixed: Any = _DecodeAt.apply(values, decoder_weight, pattern)
    return mixed


class _EncodeAt(Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        context: Any, weight: Tensor, bias: Tensor, decoder_bias: Tensor, centred: Tensor, pattern: Pattern, pre: Tensor | None
    ) -> Tensor:
        context.pattern = pattern
        context.save_for_backward(weight, centred)
        return pattern.products(centred, weight) + bias[pattern.ids] if pre is None else pre.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, centred = context.saved_tensors
        pattern: Pattern = context.pattern
        of_bias = weight.new_zeros(pattern.num_latents).index_add_(0, pattern.ids, gradient)
        return pattern.collect(gradient, centred), of_bias, -(of_bias @ weight), None, None, None


class _DecodeAt(Function):
    @staticmethod
    def forward(context: Any, values: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        context.pattern = pattern
        context.save_for_backward(values, weight)
        return pattern.mix(values, weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, weight = context.saved_tensors
        pattern: Pattern = context.pattern
        gradient = gradient.contiguous()
        return pattern.products(gradient, weight), pattern.collect(values, gradient), None


def _compressed(offsets: Tensor, ids: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # torch says once a process that its sparse layouts may change; the versions that are tested are pinned.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(offsets, ids, values, shape, check_invariants=False)


def _bags(ids: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return functional.embedding_bag(ids, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
