"""Which coordinates of the activation the autoencoder sees (METHOD 1.1; the paper's top-K activation selection, Table 6).

Every method but `random` and `all` is a sum over documents: chunks of them are summed anywhere, and the sums are merged
in order of chunks, so that the result depends on the chunks and not on who summed them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple, TypeGuard

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from finescope.config_sae import CoordinatesSection
from finescope.errors import StepFailed
from finescope.models.hooks import HookPoint, capture, hook_width, values_of_embeddings
from finescope.sae.stream import TokenBatch, used_positions

SummedMethod = Literal["jacobian", "magnitude", "variance", "pca"]

# Positions of a forward-mode pass, padding included, a probe counted like an activation.
_PASS_POSITIONS = 4096


class Coordinates(NamedTuple):
    """What is kept of an activation of `width` coordinates."""

    indices: Tensor  # [J] int64, sorted
    basis: Tensor | None  # [C, J] float32, orthonormal rows (pca: J = width); None: the coordinates themselves
    scores: Tensor  # [width] float64, of each coordinate; pca: variance along each principal direction, falling


@dataclass(frozen=True)
class Sums:
    """What some documents add up to. An observation is made of one token: |a| (magnitude), a (variance, pca), or the
    square of the derivative along one probe (jacobian).
    """

    count: int  # observations
    total: Tensor  # [width] float64, their sum
    scatter: Tensor | None  # float64, of deviations from their mean: [width] squares (variance), [width, width] products (pca)

    def to_bytes(self) -> bytes:
        """For the way from a worker to the driver (8 bytes a number: pca of 4,096 coordinates takes 134 MB)."""
        tensors = {"count": torch.tensor(self.count), "total": self.total}
        return safetensors.torch.save(tensors if self.scatter is None else {**tensors, "scatter": self.scatter})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Sums":
        """What `to_bytes` made."""
        tensors = safetensors.torch.load(data)
        return cls(int(tensors["count"]), tensors["total"], tensors.get("scatter"))


def reads_activations(method: str) -> TypeGuard[SummedMethod]:
    """Whether a method needs documents at all; `random` and `all` do not."""
    return method not in ("random", "all")


def choose_coordinates(
    model: PreTrainedModel, batches: Iterable[TokenBatch], hook: HookPoint, section: CoordinatesSection, seed: int
) -> Coordinates:
    """Coordinates by the first `section.documents` documents of `batches`, summed here as one chunk.

    Raises:
        StepFailed: as `coordinates_of`.
    """
    sums = None
    if reads_activations(section.method):
        scorer = CoordinateScorer(model, hook, section.method, section.probes, seed)
        sums = scorer(_first_documents(batches, section.documents), 0)
    return coordinates_of(sums, section, hook_width(model, hook), seed)


def coordinates_of(sums: Sums | None, section: CoordinatesSection, width: int, seed: int) -> Coordinates:
    """The `section.count` coordinates with the largest scores; of equal scores the lower index is kept.

    A count above `width` keeps all. pca keeps as many directions, of all coordinates, but never more than the
    activations span (one less than there are); the largest entry of each is positive.

    Args:
        sums: of the whole reference sample; None where the method reads no activations.

    Raises:
        StepFailed: there are too few activations, or they are not finite.
    """
    if section.method == "random":
        scores = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    elif section.method == "all":
        return Coordinates(torch.arange(width), None, torch.ones(width, dtype=torch.float64))
    else:
        assert sums is not None, section.method
        assert len(sums.total) == width, (len(sums.total), width)
        _check(sums, section)
        if section.method == "pca":
            return _principal_directions(sums, min(section.count, width))
        scores = _scores(sums, section.method)
    ranking = torch.argsort(scores, descending=True, stable=True)
    return Coordinates(ranking[: section.count].sort().values, None, scores)


def merge(parts: Iterable[Sums]) -> Sums:
    """The sums of several chunks (at least one), added in the order in which they are given."""
    return reduce(_merge_two, parts)


class CoordinateScorer:
    """Sums chunks of documents for one method, at one hook point. Any number of them may share the chunks.

    jacobian: s_j^2 = ||d a_j / d e||_F^2, e the input embeddings of the token's document, is estimated without bias as
    the mean of u_j^2, u = J v, over `probes` vectors v of independent +-1 for each document (Hutchinson's estimator of
    the diagonal of J J^T), by forward mode. Its standard deviation falls with the square root of probes and documents.

    One pass of jacobian holds an intermediate value and its tangents along some probes, of at most `_PASS_POSITIONS`
    positions in all (or of one document and one probe, where that is more), and the attention weights [heads, T, T]
    of each; nothing is kept for a backward pass. The other methods hold what a forward pass of the batch does.
    pca adds a matrix [width, width] of float64.
    """

    def __init__(self, model: PreTrainedModel, hook: HookPoint, method: SummedMethod, probes: int, seed: int) -> None:
        self._model = model
        self._hook = hook
        self._method: SummedMethod = method
        self._probes = probes
        self._seed = seed
        self._width = hook_width(model, hook)

    @torch.no_grad()
    def __call__(self, batches: Iterable[TokenBatch], chunk_index: int) -> Sums:
        """Sum over the used positions of a chunk. How it is cut into batches changes no more than the rounding.

        The probes of chunk i are drawn from a generator seeded with (seed, i), document by document.
        """
        random = np.random.default_rng((self._seed, chunk_index))
        sums = self._sums_of(torch.empty(0, self._width))
        for input_ids, attention_mask in batches:
            ids = torch.from_numpy(input_ids).to(self._model.device)
            mask = torch.from_numpy(attention_mask).to(self._model.device)
            for observations in self._observations(ids, mask, random):
                sums = _merge_two(sums, self._sums_of(observations))
        return sums

    def _observations(self, ids: Tensor, mask: Tensor, random: np.random.Generator) -> Iterator[Tensor]:
        """[N, width] each."""
        if self._method == "jacobian":
            yield from self._squared_derivatives(ids, mask, random)
            return
        (activations,) = capture(self._model, ids, mask, [self._hook])
        used = activations[used_positions(mask)]
        yield used.abs() if self._method == "magnitude" else used

    def _squared_derivatives(self, ids: Tensor, mask: Tensor, random: np.random.Generator) -> Iterator[Tensor]:
        length = ids.shape[1]
        probes = min(self._probes, max(1, _PASS_POSITIONS // length - 1))
        rows = max(1, _PASS_POSITIONS // (length * (1 + probes)))
        for some_ids, some_mask in zip(ids.split(rows), mask.split(rows), strict=True):
            embeddings = self._model.get_input_embeddings()(some_ids)
            signs = _draw_signs(some_mask, self._probes, embeddings.shape[2], random)
            used = used_positions(some_mask)
            for some_signs in signs.split(probes):
                directions = some_signs.to(embeddings)
                derivatives = directional_derivatives(self._model, embeddings, some_mask, self._hook, directions)
                yield derivatives[:, used].flatten(0, 1).double().square()

    def _sums_of(self, observations: Tensor) -> Sums:
        observations = observations.double()
        total = observations.sum(0)
        if self._method in ("jacobian", "magnitude"):
            return Sums(len(observations), total.cpu(), None)
        centred = observations - total / max(len(observations), 1)
        scatter = centred.T @ centred if self._method == "pca" else centred.square().sum(0)
        return Sums(len(observations), total.cpu(), scatter.cpu())


def directional_derivatives(
    model: PreTrainedModel, embeddings: Tensor, attention_mask: Tensor, hook: HookPoint, directions: Tensor
) -> Tensor:
    """(d a / d e) v at `hook` for P directions v at once, by forward mode: the values are computed once for all of them.

    Args:
        embeddings: [B, T, d_model], what the model's input embedding returns.
        attention_mask: [B, T].
        directions: [P, B, T, d_model], same dtype.

    Returns:
        [P, B, T, width].
    """

    def values(changed: Tensor) -> Tensor:
        return values_of_embeddings(model, changed, attention_mask, hook)

    def along(direction: Tensor) -> Tensor:
        return torch.func.jvp(values, (embeddings,), (direction,))[1]

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode rule
        return torch.func.vmap(along)(directions)


def _draw_signs(attention_mask: Tensor, probes: int, d_model: int, random: np.random.Generator) -> Tensor:
    """[probes, B, T, d_model] int8 of +-1 at tokens and 0 at padding, so that padding takes nothing from the generator."""
    signs = torch.zeros(probes, *attention_mask.shape, d_model, dtype=torch.int8)
    for row, mask in enumerate(attention_mask.bool().cpu()):
        drawn = random.integers(0, 2, (probes, int(mask.sum()), d_model), dtype=np.int8)
        signs[:, row, mask] = torch.from_numpy(drawn) * 2 - 1
    return signs


def _merge_two(left: Sums, right: Sums) -> Sums:
    """Chan, Golub and LeVeque's update: no difference of large sums is ever taken."""
    if left.count == 0 or right.count == 0:
        return right if left.count == 0 else left
    count, total = left.count + right.count, left.total + right.total
    if left.scatter is None or right.scatter is None:
        return Sums(count, total, None)
    shift = right.total / right.count - left.total / left.count
    between = shift.square() if left.scatter.dim() == 1 else torch.outer(shift, shift)
    return Sums(count, total, left.scatter + right.scatter + between * (left.count * right.count / count))


def _check(sums: Sums, section: CoordinatesSection) -> None:
    least = 1 if sums.scatter is None else 2
    if sums.count < least:
        raise StepFailed(
            f"sae.coordinates.method {section.method}: {sums.count} activations are left of the first {section.documents} "
            f"documents without the first token of each; at least {least} are needed"
        )
    if not (torch.isfinite(sums.total).all() and (sums.scatter is None or torch.isfinite(sums.scatter).all())):
        raise StepFailed(
            f"sae.coordinates.method {section.method}: activations or their derivatives are not finite; "
            "a model.dtype of larger range (float32, bfloat16) may help"
        )


def _scores(sums: Sums, method: str) -> Tensor:
    """[width] float64: root mean square over tokens of the Jacobian's row norms; mean |a|; variance of a."""
    if method == "variance":
        assert sums.scatter is not None
        return sums.scatter / sums.count
    mean = sums.total / sums.count
    return mean.sqrt() if method == "jacobian" else mean


def _principal_directions(sums: Sums, count: int) -> Coordinates:
    assert sums.scatter is not None
    variances, vectors = torch.linalg.eigh(sums.scatter / sums.count)  # rising; a column a direction
    directions = vectors.T.flip(0)[: min(count, sums.count - 1)]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return Coordinates(torch.arange(len(vectors)), (directions * largest.sign()).float(), variances.flip(0).clamp(min=0))


def _first_documents(batches: Iterable[TokenBatch], documents: int) -> Iterator[TokenBatch]:
    left = documents
    for input_ids, attention_mask in batches:
        yield input_ids[:left], attention_mask[:left]
        left -= len(input_ids)
        if left <= 0:
            return
